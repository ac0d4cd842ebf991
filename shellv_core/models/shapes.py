"""Models without weights: their layers and sizes alone, from their settings, for what only needs to count."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedConfig,
)

from shellv_core.errors import ModelError
from shellv_core.models.compose import PROJECTOR_ACTIVATIONS, TRANSFORMERS_TOWERS
from shellv_core.models.config import ModelConfig, VisionTowerConfig
from shellv_core.models.efficientnet_lite import EfficientNetLiteConfig

#: Sizes of published models by their hub ids, so that they need not be downloaded to be counted. Sources: their
#: config.json; Shell-7B's as models.codeshell converts it.
PUBLISHED: dict[str, tuple[str, dict[str, Any]]] = {
    "WisdomShell/Shell-7B": (
        "starcoder2",
        {
            "vocab_size": 70144,
            "hidden_size": 4096,
            "intermediate_size": 16384,
            "num_hidden_layers": 42,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "max_position_embeddings": 8192,
            "sliding_window": None,
        },
    ),
    "lmsys/vicuna-7b-v1.5": (
        "llama",
        {
            "vocab_size": 32000,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 32,
            "max_position_embeddings": 4096,
        },
    ),
    "openai/clip-vit-large-patch14-336": (
        "clip_vision_model",
        {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "patch_size": 14,
            "image_size": 336,
        },
    ),
}


def model_without_weights(config: ModelConfig) -> LlavaForConditionalGeneration:
    """The model that `config` describes, on the meta device.

    Raises:
        ModelError: if a pretrained part is neither a directory, nor a published model known here, nor to be had.
    """
    tower_config = _tower_config(config.vision_tower)
    text: Any
    if config.language_model.pretrained:
        text = _published_config(config.language_model.pretrained)
    else:
        options = {
            **config.language_model.options,
            "vocab_size": config.tokenizer.vocab_size,
            "tie_word_embeddings": config.language_model.tie_word_embeddings,
        }
        text = CONFIG_MAPPING[config.language_model.model_type](**options)
    sizes: Any = tower_config
    patches = (sizes.image_size // sizes.patch_size) ** 2
    tower = config.vision_tower
    llava = LlavaConfig(
        vision_config=tower_config.to_dict(),
        text_config=text.to_dict(),
        image_token_index=text.vocab_size - 1,
        image_seq_length=patches + int(tower.kind == "clip" and tower.select_strategy == "full"),
        projector_hidden_act=PROJECTOR_ACTIVATIONS[config.projector],
        vision_feature_layer=tower.feature_layer,
        vision_feature_select_strategy=tower.select_strategy,
        tie_word_embeddings=text.tie_word_embeddings,
    )
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava)
    model.generation_config = GenerationConfig(eos_token_id=0, pad_token_id=0)
    return model.to(getattr(torch, config.dtype)).eval()


def _tower_config(config: VisionTowerConfig) -> PreTrainedConfig:
    if config.kind == "efficientnet_lite0":
        return EfficientNetLiteConfig(image_size=config.image_size, **config.options)
    if config.pretrained:
        found = _published_config(config.pretrained)
        return getattr(found, "vision_config", found)
    options: dict[str, Any] = {"image_size": config.image_size, **config.options}
    return TRANSFORMERS_TOWERS[config.kind][0](**options)


def _published_config(name: str) -> PreTrainedConfig:
    if name in PUBLISHED and not Path(name).is_dir():
        model_type, options = PUBLISHED[name]
        return CONFIG_MAPPING[model_type](**options)
    try:
        found: PreTrainedConfig = AutoConfig.from_pretrained(name)
    except (OSError, ValueError) as error:
        raise ModelError(
            f"the settings of {name!r} are not available here ({str(error).strip().splitlines()[0]}). Give a directory"
            f" with its config.json, or one of {', '.join(PUBLISHED)}."
        ) from error
    return found
