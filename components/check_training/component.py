"""Training against the memory and disk that it will get."""

from kfp import dsl

from components.base import component


@component("train")
def check_training(
    preset: str,
    overrides: list[str],
    stages: list[str],
    accelerator_gb: float,
    num_accelerators: str,
    scratch_gb: float,
    report: dsl.Output[dsl.Markdown],
    nodes: int = 1,
    pods: dict = {},  # noqa: B006 - kfp reads the literal
) -> None:
    """Estimate the memory and disk of the training stages, without an accelerator, before one is taken.

    Args:
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.
        stages: Those that the pipeline has.
        accelerator_gb: Memory of one accelerator in 10^9 bytes; 0 checks nothing.
        num_accelerators: Accelerators of each training task.
        scratch_gb: Disk of a node in 10^9 bytes for checkpoints and models; 0 leaves that unchecked.
        nodes: Machines that train together; above 1 in the pods of a TrainJob.
        pods: What those pods get, as settings of LaunchConfig.

    Returns:
        report: What was estimated.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages import check_training
    from shellv_core.stages.artifacts import write_text
    from shellv_core.stages.launch import launch_config
    from shellv_core.stages.preflight import table

    config = check_training.CheckTrainingConfig(
        preset=preset,
        overrides=overrides,
        stages=stages,
        accelerator_gb=accelerator_gb,
        num_accelerators=int(num_accelerators),
        scratch_gb=scratch_gb,
        launch=launch_config(nodes, pods),
    )
    write_text(table(check_training.run(config)), report)
