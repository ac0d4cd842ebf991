"""One model directory out of a base model and its adapter."""

from kfp import dsl

from components.base import component


@component("train")
def merge_lora(
    adapter_uri: str,
    root_uri: str,
    preset: str,
    overrides: list[str],
    model: dsl.Output[dsl.Model],
) -> str:
    """Merge an adapter into a model that plain transformers loads.

    Args:
        adapter_uri: Output of finetune, which names its base model.
        root_uri: Folder below which the output goes, s3:// or file://.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.

    Returns:
        Output: URI of the merged model directory.
        model: Where the model lies, its hash, counts and lineage.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages import merge_lora
    from shellv_core.stages.artifacts import write_reference
    from shellv_core.stages.presets import stage_config

    uris = {"adapter_uri": adapter_uri, "output_uri": f"{root_uri}/merge_lora/{{fingerprint}}"}
    result = merge_lora.run(stage_config(preset, "merge_lora", overrides, **uris))
    write_reference(result, model)
    return result.output_uri
