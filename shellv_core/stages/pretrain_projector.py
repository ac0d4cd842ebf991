"""pretrain_projector: compose a model and train its projector, if asked its language model too, on the training split.

Output: ``model/``, a directory that transformers loads; where HACL's contrast was used, ``hacl/heads.safetensors`` too.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from shellv_core.models.config import ModelConfig
from shellv_core.stages.heads import put_heads, start_heads
from shellv_core.stages.runner import TRAINING_CODE, StageConfig, StageResult, StageRun, run_stage
from shellv_core.stages.training_report import put_report
from shellv_core.training.config import AlignmentConfig, HaclConfig, TrainingConfig

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    from shellv_core.training.fit import TrainingData

CALIBRATION_IMAGES = 256


class PretrainProjectorConfig(StageConfig):
    """Settings of pretrain_projector.

    Attributes:
        data_uri: output of prepare_data.
        alignment: align the projector with the caption's words first; for language models without pretraining.
        hacl: the contrastive objective, off by default; the paper has it in this stage.
    """

    data_uri: str = ""
    model: ModelConfig = ModelConfig()
    alignment: AlignmentConfig | None = None
    hacl: HaclConfig = HaclConfig()
    training: TrainingConfig = TrainingConfig(global_batch_size=256, projector_learning_rate=1e-3)


def inputs(config: PretrainProjectorConfig) -> dict[str, str]:
    """The committed folders that the stage reads, by name."""
    return {"data": config.data_uri}


def run(config: PretrainProjectorConfig) -> StageResult:
    """Make ``model/`` in `config.output_uri`."""
    return run_stage(
        "pretrain_projector",
        config,
        _body,
        inputs=inputs(config),
        code=TRAINING_CODE,
        shared=True,
        checkpoint_uri=config.training.checkpoint_uri,
    )


def _body(run: StageRun[PretrainProjectorConfig]) -> None:
    import torch

    from shellv_core.models.compose import load_model, save_model, stored_dtype
    from shellv_core.training.fit import TrainingData, fit
    from shellv_core.training.loop import set_trainable
    from shellv_core.training.model import TrainingModel
    from shellv_core.training.processes import first_on_node

    data, training = TrainingData.of(run.inputs["data"], "train"), run.config.training
    initial = run.work / "initial"
    with first_on_node():
        if not initial.exists():
            model, processor = _build(run.config, data)
            unfinished = run.work / "initial.unfinished"
            save_model(model, processor, unfinished)
            unfinished.rename(initial)
    model, processor = load_model(initial, None if training.precision == "bf16" else torch.float32)
    heads = start_heads(run.config.hacl, model, run.config.seed)
    module = TrainingModel(model, heads, run.config.hacl)
    set_trainable(module, training)
    summary = fit(
        module,
        processor,
        data,
        training,
        run.config.seed,
        run.work,
        run.log_metrics,
        "pretrain_projector",
        run.config.alignment,
        run.checkpoints,
    )
    if not run.first:
        return
    put_report("pretrain_projector", run, module, run.config.training)
    module.to("cpu")
    save_model(model, processor, run.work / "model", stored_dtype(initial))
    run.output.put_tree(run.work / "model", "model")
    put_heads(heads, run)
    run.metrics.update(summary.metrics)
    run.details.update(num_steps=summary.num_steps, **summary.details)


def _build(config: PretrainProjectorConfig, data: TrainingData) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    from itertools import islice

    from shellv_core.models.compose import build_model, calibrate_vision_tower
    from shellv_core.training.examples import image_bytes
    from shellv_core.training.features import pixel_batches
    from shellv_core.training.fit import tokenizer_texts

    model, processor = build_model(
        config.model, tokenizer_texts(data.read(), config.model.conversation_template), config.seed
    )
    if config.model.vision_tower.standardize:
        images = islice(image_bytes(data.read()), CALIBRATION_IMAGES)
        calibrate_vision_tower(model, pixel_batches(images, processor))
    return model, processor
