"""finetune: train LoRA adapters and the projector with the generation loss, HACL's contrast and a preference.

Output: ``adapter/`` and, where the contrast was used, ``hacl/heads.safetensors``. Without LoRA the whole model is
trained and the output is ``model/``.
"""

from __future__ import annotations

from pydantic import model_validator

from shellv_core.models.config import LoraConfig
from shellv_core.stages.heads import put_heads, start_heads
from shellv_core.stages.runner import TRAINING_CODE, StageConfig, StageResult, StageRun, run_stage
from shellv_core.stages.training_report import put_report
from shellv_core.training.config import HaclConfig, PreferenceConfig, TrainingConfig


class FinetuneConfig(StageConfig):
    """Settings of finetune.

    Attributes:
        data_uri: output of prepare_data.
        model_uri: output of pretrain_projector.
        lora: adapters on the language model; null trains its own weights.
        hacl: the contrastive objective; ``hacl.weight=0`` is the plain baseline. Heads that pretraining trained are
            trained on.
        preference: captions preferred over hallucinated captions; off by default. Its reference is the model before
            this stage: the same one without its adapters, or without LoRA a frozen copy of what is trained.
    """

    data_uri: str = ""
    model_uri: str = ""
    lora: LoraConfig | None = LoraConfig()
    hacl: HaclConfig = HaclConfig(weight=0.5)
    preference: PreferenceConfig = PreferenceConfig()
    training: TrainingConfig = TrainingConfig(
        global_batch_size=128, trainable=("projector", "language_model"), projector_learning_rate=2e-5
    )

    @model_validator(mode="after")
    def _check(self) -> FinetuneConfig:
        if self.lora and "language_model" not in self.training.trainable:
            raise ValueError(
                "lora adapts the language model, which training.trainable leaves out; add it or set lora=null"
            )
        if self.lora and self.lora.quantization and self.training.zero_stage == 3:
            raise ValueError(
                f"lora.quantization={self.lora.quantization} does not go together with training.zero_stage=3: quantized"
                " weights cannot be shared; take another stage or engine"
            )
        return self


def inputs(config: FinetuneConfig) -> dict[str, str]:
    """The committed folders that the stage reads, by name."""
    return {"data": config.data_uri, "model": config.model_uri}


def run(config: FinetuneConfig) -> StageResult:
    """Make ``adapter/`` (or ``model/``) in `config.output_uri`."""
    return run_stage(
        "finetune",
        config,
        _body,
        inputs=inputs(config),
        code=TRAINING_CODE,
        shared=True,
        checkpoint_uri=config.training.checkpoint_uri,
    )


def _body(run: StageRun[FinetuneConfig]) -> None:
    import torch

    from shellv_core.models.compose import check_quantization, load_model, save_model, stored_dtype
    from shellv_core.models.lora import add_lora, save_adapter
    from shellv_core.training.fit import TrainingData, fit
    from shellv_core.training.loop import set_trainable
    from shellv_core.training.model import TrainingModel, frozen_copy
    from shellv_core.training.processes import first_on_node

    config, data = run.config, TrainingData.of(run.inputs["data"], "train")
    quantization = config.lora.quantization if config.lora else None
    check_quantization(quantization)
    bf16 = config.training.precision == "bf16"
    with first_on_node():
        base = run.inputs["model"].fetch_tree("model/")
    model, processor = load_model(
        base, None if bf16 else torch.float32, quantization, torch.bfloat16 if bf16 else torch.float32
    )
    heads = start_heads(config.hacl, model, config.seed, run.inputs["model"])
    module = TrainingModel(model, heads, config.hacl, config.preference)
    set_trainable(module, config.training)
    if config.preference.weight and not config.lora:
        module.reference = frozen_copy(model)
    adapted = None
    if config.lora:
        adapted = add_lora(model, config.lora, "projector" in config.training.trainable, config.seed)
    summary = fit(
        module,
        processor,
        data,
        config.training,
        config.seed,
        run.work,
        run.log_metrics,
        "finetune",
        checkpoint_address=run.checkpoints,
    )
    if not run.first:
        return
    put_report("finetune", run, module, run.config.training)
    module.to("cpu")
    if adapted is None:
        save_model(model, processor, run.work / "model", stored_dtype(base))
        run.output.put_tree(run.work / "model", "model")
    else:
        save_adapter(adapted, run.work / "adapter", run.inputs["model"].uri)
        run.output.put_tree(run.work / "adapter", "adapter")
    put_heads(heads, run)
    run.metrics.update(summary.metrics)
    run.details.update(num_steps=summary.num_steps, base_model_uri=run.inputs["model"].uri, **summary.details)
