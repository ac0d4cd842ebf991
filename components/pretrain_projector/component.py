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
    nodes: int = 1,
    pods: dict = {},  # noqa: B006 - kfp reads the literal
) -> str:
    """Compose the model and align its projector.

    Args:
        data_uri: Output of prepare_data.
        root_uri: Folder below which the output goes, s3:// or file://.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.
        nodes: Machines that train together; above 1 in the pods of a TrainJob, while this task waits.
        pods: What those pods get, as settings of LaunchConfig; see shellv_core/stages/launch.py.

    Returns:
        Output: URI of the model directory.
        model: Where the model lies, its hash, counts and lineage.
        metrics: Losses and throughput.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages.artifacts import write_metrics, write_reference
    from shellv_core.stages.launch import launch_config, run_training
    from shellv_core.stages.presets import stage_config

    uris = {"data_uri": data_uri, "output_uri": f"{root_uri}/pretrain_projector/{{fingerprint}}"}
    config = stage_config(preset, "pretrain_projector", overrides, **uris)
    result = run_training("pretrain_projector", config, launch_config(nodes, pods))
    write_reference(result, model)
    write_metrics(result, metrics)
    return result.output_uri
