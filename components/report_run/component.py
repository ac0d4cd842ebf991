"""The end of a run, however it ended."""

from kfp import dsl

from components.base import component


@component("control")
def report_run(root_uri: str, status: dsl.PipelineTaskFinalStatus, report: dsl.Output[dsl.Markdown]) -> None:
    """Remove what a run left on the cluster, and tell how it ended.

    Args:
        root_uri: Folder of all outputs, s3:// or file://.
        status: How the run ended, filled in by Kubeflow Pipelines.

    Returns:
        report: How the run ended, its stages and what was removed.
    """
    from shellv_core.stages.task import begin_task

    begin_task()

    from shellv_core.stages import report_run
    from shellv_core.stages.artifacts import write_text

    config = report_run.ReportRunConfig(root_uri=root_uri, state=status.state, error=status.error_message or "")
    write_text(report_run.run(config), report)
