"""All that can be known to be wrong before a run starts."""

from kfp import dsl

from components.base import component


@component("control")
def preflight(
    root_uri: str,
    preset: str,
    overrides: list[str],
    stages: list[str],
    report: dsl.Output[dsl.Markdown],
    deploy_target: str = "",
) -> str:
    """Check settings, object store, MLflow and disk, and report all faults at once.

    Args:
        root_uri: Folder of all outputs, s3:// or file://; it is written to, read and listed.
        preset: Settings to start from.
        overrides: Single settings that differ, as STAGE.key=value.
        stages: Those that the pipeline has.
        deploy_target: Where its deploy stage deploys to; empty for what the settings say.

    Returns:
        Output: Empty, or the run's id where it evaluates with a judge, so that no cached evaluation stands in.
        report: What was checked and found.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages import preflight
    from shellv_core.stages.artifacts import write_text
    from shellv_core.stages.task import run_id

    config = preflight.PreflightConfig(
        root_uri=root_uri, preset=preset, overrides=overrides, stages=stages, deploy_target=deploy_target
    )
    write_text(preflight.table(preflight.run(config)), report)
    return run_id() * preflight.needs_judge(config)
