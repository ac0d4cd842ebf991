"""The composed model with an aligned projector."""

from kfp import dsl

from components.base import component


@component("train")
def pretrain_projector(
    data_uri: str,
    root_uri: str,
    preset: str,
    overrides: list[str],
    model: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
) -> str:
    """Compose the model and align its projector.

    Args:
        data_uri: Output of prepare_data.
        root_uri: Folder below which the output goes, s3:// or file://.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.

    Returns:
        Output: URI of the model directory.
        model: Where the model lies, its hash, counts and lineage.
        metrics: Losses and throughput.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages import pretrain_projector
    from shellv_core.stages.artifacts import write_metrics, write_reference
    from shellv_core.stages.presets import stage_config

    uris = {"data_uri": data_uri, "output_uri": f"{root_uri}/pretrain_projector/{{fingerprint}}"}
    result = pretrain_projector.run(stage_config(preset, "pretrain_projector", overrides, **uris))
    write_reference(result, model)
    write_metrics(result, metrics)
    return result.output_uri
