"""A LoRA adapter, trained with the HACL objective or without it."""

from kfp import dsl

from components.base import component


@component("train")
def finetune(
    data_uri: str,
    model_uri: str,
    root_uri: str,
    preset: str,
    overrides: list[str],
    adapter: dsl.Output[dsl.Model],
    metrics: dsl.Output[dsl.Metrics],
    task_overrides: list[str] = [],  # noqa: B006 - kfp reads the literal
    nodes: int = 1,
    pods: dict = {},  # noqa: B006 - kfp reads the literal
) -> str:
    """LoRA finetuning with the HACL objective.

    Args:
        data_uri: Output of prepare_data.
        model_uri: Output of pretrain_projector.
        root_uri: Folder below which the output goes, s3:// or file://.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.
        task_overrides: More of them, which win: what sets this task of a pipeline apart.
        nodes: Machines that train together; above 1 in the pods of a TrainJob, while this task waits.
        pods: What those pods get, as settings of LaunchConfig; see shellv_core/stages/launch.py.

    Returns:
        Output: URI of the adapter and the HACL heads.
        adapter: Where the adapter lies, its hash, counts and lineage.
        metrics: Losses and throughput.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages.artifacts import write_metrics, write_reference
    from shellv_core.stages.launch import launch_config, run_training
    from shellv_core.stages.presets import stage_config

    uris = {"data_uri": data_uri, "model_uri": model_uri, "output_uri": f"{root_uri}/finetune/{{fingerprint}}"}
    config = stage_config(preset, "finetune", [*overrides, *task_overrides], **uris)
    result = run_training("finetune", config, launch_config(nodes, pods))
    write_reference(result, adapter)
    write_metrics(result, metrics)
    return result.output_uri
