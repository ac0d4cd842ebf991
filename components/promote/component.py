"""A registered model version and the verdict about it."""

from kfp import dsl

from components.base import component


@component("control")
def promote(
    model_uri: str,
    evaluation_uri: str,
    root_uri: str,
    preset: str,
    overrides: list[str],
    verdict: dsl.Output[dsl.Artifact],
    registered_model: str = "",
) -> str:
    """Register a model and decide whether it becomes the champion.

    Args:
        model_uri: Output of merge_lora.
        evaluation_uri: Output of evaluate for that model.
        registered_model: Name in the model registry; empty for what the settings say.
        root_uri: Folder below which the output goes, s3:// or file://.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.

    Returns:
        Output: URI of the verdict and its reasons.
        verdict: Where the verdict lies, its reasons, counts and lineage.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages import promote
    from shellv_core.stages.artifacts import write_reference
    from shellv_core.stages.presets import stage_config

    uris = {"model_uri": model_uri, "evaluation_uri": evaluation_uri}
    uris["output_uri"] = f"{root_uri}/promote/{{fingerprint}}"
    result = promote.run(stage_config(preset, "promote", overrides, **uris, registered_model=registered_model))
    write_reference(result, verdict)
    return result.output_uri
