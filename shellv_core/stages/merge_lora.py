"""merge_lora: fold a finetuned adapter into its base model.

Output: ``model/``, a directory that transformers loads, with no trace of the adapter. What holds a whole model already
(an output of merge_lora, or of finetune without LoRA) comes out as it is.
"""

from __future__ import annotations

from shellv_core.stages.runner import StageConfig, StageResult, StageRun, run_stage


class MergeLoraConfig(StageConfig):
    """Settings of merge_lora.

    Attributes:
        adapter_uri: output of finetune; it names its base model.
    """

    adapter_uri: str = ""


def run(config: MergeLoraConfig) -> StageResult:
    """Make ``model/`` in `config.output_uri`."""
    return run_stage("merge_lora", config, _body, inputs={"adapter": config.adapter_uri}, code=("models",))


def _body(run: StageRun[MergeLoraConfig]) -> None:
    from shellv_core.errors import ModelError
    from shellv_core.models.lora import merge_adapter
    from shellv_core.storage import InputDirectory

    source = run.inputs["adapter"]
    if source.files("model/"):
        run.output.put_tree(source.fetch_tree("model/"), "model")
        return
    if not source.files("adapter/"):
        raise ModelError(f"{source.uri} holds neither adapter/ nor model/; give an output of finetune.")
    base = InputDirectory(source.manifest.details["base_model_uri"])
    trained_on = source.manifest.inputs["model"].content_sha256
    if base.content_sha256 != trained_on:
        raise ModelError(
            f"{base.uri} is not the model that the adapter in {source.uri} was trained on: its content hash is"
            f" {base.content_sha256}, {trained_on} is expected. Restore that model or finetune again."
        )
    merge_adapter(base.fetch_tree("model/"), source.fetch_tree("adapter/"), run.work / "model")
    run.output.put_tree(run.work / "model", "model")
    run.details["base_model_uri"] = base.uri
