"""Presets: functions that return the full settings of all stages.

A preset holds everything but addresses, which the caller gives: pipeline parameters are URIs, a preset and overrides.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from shellv_core.config import Config, apply_overrides, build_config, nearest
from shellv_core.data.config import ScenesSource, TokensConfig
from shellv_core.data.hallucination.config import HallucinationConfig
from shellv_core.data.scenes.config import ScenesConfig
from shellv_core.data.sources.config import LlavaSource
from shellv_core.errors import ConfigError
from shellv_core.models.config import LanguageModelConfig, LoraConfig, ModelConfig, TokenizerConfig, VisionTowerConfig
from shellv_core.stages import STAGE_NAMES
from shellv_core.stages.deploy import DeployConfig
from shellv_core.stages.evaluate import EvaluateConfig
from shellv_core.stages.finetune import FinetuneConfig
from shellv_core.stages.merge_lora import MergeLoraConfig
from shellv_core.stages.prepare_data import PrepareDataConfig
from shellv_core.stages.pretrain_projector import PretrainProjectorConfig
from shellv_core.stages.promote import PromoteConfig
from shellv_core.training.config import AlignmentConfig, HaclConfig, TrainingConfig

#: Where ``make smollm2`` writes SmolLM2-135M-Instruct.
SMOLLM2 = ".shellv/models/SmolLM2-135M-Instruct"


class Preset(Config):
    """The settings of the seven stages, addresses left open."""

    prepare_data: PrepareDataConfig
    pretrain_projector: PretrainProjectorConfig
    finetune: FinetuneConfig
    merge_lora: MergeLoraConfig
    evaluate: EvaluateConfig
    promote: PromoteConfig
    deploy: DeployConfig


def nano() -> Preset:
    """Minutes on two CPU cores: synthetic scenes, ImageNet features, a small language model trained from nothing.

    As no pretrained language model of this size exists, pretrain_projector trains it along with the projector, after
    the projector was aligned with the captions' words; its tasks are those from which looking is learned soonest.
    """
    training = TrainingConfig(
        global_batch_size=16,
        max_steps=1500,
        trainable=("projector", "language_model"),
        projector_learning_rate=5e-4,
        language_model_learning_rate=1e-3,
        warmup_ratio=0.05,
        weight_decay=0.05,
        adam_beta2=0.95,
        precision="bf16",
        max_length=320,
        checkpoint_every_steps=100,
    )
    return Preset(
        prepare_data=PrepareDataConfig(scenes=ScenesSource(num_train=8000, num_validation=400)),
        pretrain_projector=PretrainProjectorConfig(
            model=_small_model(256, 2),
            alignment=AlignmentConfig(epochs=8),
            training=training.model_copy(
                update={"tasks": ("existence", "named", "checklist", "description", "detail", "list")}
            ),
        ),
        finetune=FinetuneConfig(
            lora=LoraConfig(r=32, alpha=64),
            hacl=HaclConfig(weight=0.1),
            training=training.model_copy(
                update={"max_steps": 300, "language_model_learning_rate": 5e-4, "projector_learning_rate": 2e-4}
            ),
        ),
        merge_lora=MergeLoraConfig(),
        evaluate=EvaluateConfig(),
        promote=PromoteConfig(registered_model="shellv-nano"),
        deploy=DeployConfig(registered_model="shellv-nano", question="Describe the image."),
    )


def smoke() -> Preset:
    """`nano` cut down to seconds a stage: it shows that everything works, not that the model does."""
    full = nano()
    scenes = ScenesSource(num_train=240, num_validation=48, benchmark_images=24, scenes=ScenesConfig(image_size=96))
    quick = {"max_steps": 12, "global_batch_size": 8, "checkpoint_every_steps": 3, "log_every_steps": 4}
    pretraining, finetuning = full.pretrain_projector, full.finetune
    return full.model_copy(
        update={
            "prepare_data": PrepareDataConfig(scenes=scenes, samples_per_shard=60),
            "pretrain_projector": pretraining.model_copy(
                update={
                    "model": _small_model(64, 2, image_size=96),
                    "training": pretraining.training.model_copy(update=quick),
                }
            ),
            "finetune": finetuning.model_copy(update={"training": finetuning.training.model_copy(update=quick)}),
            "evaluate": EvaluateConfig(max_captions=12, max_caption_tokens=12, max_hal_eval_items=6),
            "promote": PromoteConfig(registered_model="shellv-smoke", thresholds_uri="smoke"),
            "deploy": DeployConfig(registered_model="shellv-smoke", max_answer_tokens=8),
        }
    )


def smollm2() -> Preset:
    """Real weights at minutes a stage on one CPU core: SmolLM2-135M-Instruct and the ImageNet tower, on few scenes.

    Word alignment brings the projector close to the words that the language model knows, at little cost; the steps that
    follow are few, as each runs a hundred times nano's weights. ``make smollm2`` puts the language model where this
    looks for it; see docs/models.md.
    """
    training = TrainingConfig(
        global_batch_size=8,
        max_steps=60,
        projector_learning_rate=1e-3,
        warmup_ratio=0.1,
        precision="bf16",
        max_length=320,
        checkpoint_every_steps=20,
    )
    return Preset(
        prepare_data=PrepareDataConfig(scenes=ScenesSource(num_train=3000, num_validation=60, benchmark_images=24)),
        pretrain_projector=PretrainProjectorConfig(
            model=ModelConfig(
                vision_tower=VisionTowerConfig(image_size=160),
                language_model=LanguageModelConfig(model_type="llama", pretrained=SMOLLM2),
                tokenizer=TokenizerConfig(pretrained=SMOLLM2),
                template="chatml",
            ),
            alignment=AlignmentConfig(epochs=20),
            training=training.model_copy(update={"tasks": ("description", "list")}),
        ),
        finetune=FinetuneConfig(
            lora=LoraConfig(r=32, alpha=64),
            hacl=HaclConfig(weight=0.1),
            training=training.model_copy(
                update={
                    "max_steps": 40,
                    "tasks": ("existence", "description", "detail", "list"),
                    "trainable": ("projector", "language_model"),
                    "projector_learning_rate": 3e-4,
                    "language_model_learning_rate": 5e-4,
                }
            ),
        ),
        merge_lora=MergeLoraConfig(),
        evaluate=EvaluateConfig(dtype="bfloat16"),
        promote=PromoteConfig(registered_model="shellv-smollm2"),
        deploy=DeployConfig(registered_model="shellv-smollm2", question="Describe the image."),
    )


def shellv_7b() -> Preset:
    """The published recipe: CLIP ViT-L/14-336 and Shell-7B, one epoch each of 558k pairs and 665k conversations."""
    common = TrainingConfig(
        global_batch_size=256,
        micro_batch_size=16,
        epochs=1.0,
        projector_learning_rate=1e-3,
        warmup_ratio=0.03,
        precision="bf16",
        tf32=True,
        gradient_checkpointing=True,
        max_length=2048,
        cache_features=False,
        checkpoint_every_steps=300,
    )
    return Preset(
        prepare_data=PrepareDataConfig(
            llava=LlavaSource(annotations="", images="", answers_are_captions=True),
            tokens=TokensConfig(tokenizer="WisdomShell/Shell-7B", template="shellv"),
            hallucination=HallucinationConfig(),
        ),
        pretrain_projector=PretrainProjectorConfig(
            model=ModelConfig(
                vision_tower=VisionTowerConfig(
                    kind="clip",
                    pretrained="openai/clip-vit-large-patch14-336",
                    image_size=336,
                    feature_layer=-2,
                    select_strategy="default",
                    standardize=False,
                ),
                language_model=LanguageModelConfig(pretrained="WisdomShell/Shell-7B"),
                tokenizer=TokenizerConfig(pretrained="WisdomShell/Shell-7B"),
                template="shellv",
                dtype="bfloat16",
            ),
            training=common,
        ),
        finetune=FinetuneConfig(
            lora=LoraConfig(r=128, alpha=256, dropout=0.05),
            hacl=HaclConfig(weight=1.0, negatives="paired"),
            training=common.model_copy(
                update={
                    "global_batch_size": 128,
                    "trainable": ("projector", "language_model"),
                    "projector_learning_rate": 2e-5,
                    "language_model_learning_rate": 2e-5,
                }
            ),
        ),
        merge_lora=MergeLoraConfig(),
        evaluate=EvaluateConfig(dtype="bfloat16"),
        promote=PromoteConfig(registered_model="shellv-7b"),
        deploy=DeployConfig(registered_model="shellv-7b"),
    )


def _small_model(hidden_size: int, num_layers: int, image_size: int = 160) -> ModelConfig:
    return ModelConfig(
        vision_tower=VisionTowerConfig(image_size=image_size),
        language_model=LanguageModelConfig(
            model_type="starcoder2",
            options={
                "hidden_size": hidden_size,
                "intermediate_size": 2 * hidden_size,
                "num_hidden_layers": num_layers,
                "num_attention_heads": hidden_size // 64 or 1,
                "num_key_value_heads": hidden_size // 64 or 1,
                "max_position_embeddings": 1024,
                "sliding_window": None,
            },
            tie_word_embeddings=True,
            matching=0.8,
        ),
        tokenizer=TokenizerConfig(vocab_size=1024),
    )


PRESETS: dict[str, Callable[[], Preset]] = {
    "nano": nano,
    "smoke": smoke,
    "smollm2": smollm2,
    "shellv-7b": shellv_7b,
}


def preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        ConfigError: if there is none, with the nearest name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]()


def stage_config(preset_name: str, stage: str, overrides: Sequence[str] = (), **values: Any) -> Any:
    """A stage's config: the preset's, then the overrides addressed to it, then `values` (its addresses).

    Args:
        overrides: ``STAGE.key=value`` strings; those of other stages are checked and left out, and ``seed=N`` without
            a stage goes to every stage.
        values: an empty text leaves what the preset and the overrides say.

    Raises:
        ConfigError: for an unknown preset, stage or key, with the nearest name.
    """
    full = preset(preset_name)
    spread = [each for override in overrides for each in _spread(override)]
    full = apply_overrides(full, spread)
    config = getattr(full, stage)
    given = {key: value for key, value in values.items() if value != ""}
    return build_config(type(config), {**config.model_dump(), **given})


def overrides_of(stage: str, overrides: Sequence[str]) -> list[str]:
    """Those of `overrides` that concern `stage`, in their order."""
    return [each for override in overrides for each in _spread(override) if each.startswith(f"{stage}.")]


def stage_module(name: str) -> Any:
    """The module of stage `name`, with its ``run``."""
    return importlib.import_module(f"shellv_core.stages.{name}")


def _spread(override: str) -> list[str]:
    return [f"{stage}.{override}" for stage in STAGE_NAMES] if override.startswith("seed=") else [override]
