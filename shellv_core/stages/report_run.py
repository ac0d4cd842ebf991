"""The end of a pipeline run, however it ended: what it left on the cluster is removed, and what happened is told."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from shellv_core.config import Config
from shellv_core.errors import TrackingError
from shellv_core.logs import get_logger
from shellv_core.stages.task import run_id

logger = get_logger(__name__)
#: Tag of MLflow runs that a pipeline run made.
PIPELINE_RUN_TAG = "shellv.pipeline_run"
STAGE_TAG, OUTPUT_TAG = "shellv.stage", "shellv.output_uri"
#: MLflow's words for a run that did not end well.
NOT_WELL = ("FAILED", "KILLED")


class ReportRunConfig(Config):
    """What the workflow engine says of a run.

    Attributes:
        root_uri: folder of its outputs.
        state: SUCCEEDED, FAILED or CANCELLED, as Kubeflow Pipelines names it.
        error: its message, where there is one.
    """

    root_uri: str
    state: str
    error: str = ""


@dataclass(frozen=True)
class Worked:
    """A stage that did work in the run, `seconds` long; one whose output was there already is none."""

    stage: str
    status: str
    seconds: float
    output_uri: str
    link: str


def run(config: ReportRunConfig) -> str:
    """Clean up after the run that this task belongs to, and tell about it.

    Returns:
        Markdown.

    Raises:
        ClusterError: if something could not be removed from the cluster, since it may hold accelerators.
    """
    worked, faults = _worked()
    removed = _clean_up()
    failed = [each.stage for each in worked if each.status in NOT_WELL]
    logger.info("report: run %s %s, %d stage(s) did work", run_id() or "unknown", config.state.lower(), len(worked))
    for note in [*(f"{stage} failed" for stage in failed), *faults, *removed]:
        logger.info("report: %s", note)
    return render(config, worked, [*faults, *removed])


def render(config: ReportRunConfig, worked: Sequence[Worked], notes: Sequence[str]) -> str:
    """The report as Markdown."""
    failed = [each.stage for each in worked if each.status in NOT_WELL]
    facts = {
        "state": config.state,
        "run": run_id() or "unknown",
        "stage that failed": ", ".join(failed),
        "error": config.error.replace("\n", " "),
        "outputs": config.root_uri,
    }
    lines = [f"# Run {config.state.lower()}", ""]
    lines += [f"- {name}: {value}" for name, value in facts.items() if value]
    lines += [f"- {note}" for note in notes]
    if worked:
        lines += ["", "| stage | status | seconds | output | tracked run |", "| --- | --- | --- | --- | --- |"]
        lines += [
            f"| {each.stage} | {each.status} | {each.seconds:.0f} | {each.output_uri} | {each.link} |"
            for each in worked
        ]
    return "\n".join(lines) + "\n"


def _worked() -> tuple[list[Worked], list[str]]:
    """What MLflow knows of this run's stages, first to last; and what kept it from being asked."""
    from mlflow.exceptions import MlflowException

    from shellv_core.tracking.runs import open_client

    if not run_id():
        return [], []
    try:
        client = open_client()
        experiments = [each.experiment_id for each in client.search_experiments()]
        found = client.search_runs(
            experiments, f"tags.`{PIPELINE_RUN_TAG}` = '{run_id()}'", order_by=["attributes.start_time ASC"]
        )
    except (TrackingError, MlflowException) as error:
        return [], [f"stages unknown: {str(error).splitlines()[0]}"]
    return [_read(each) for each in found], []


def _read(run: object) -> Worked:
    info, tags = run.info, run.data.tags  # type: ignore[attr-defined]
    seconds = ((info.end_time or info.start_time) - info.start_time) / 1000
    server = os.environ.get("MLFLOW_TRACKING_URI", "")
    page = f"{server.rstrip('/')}/#/experiments/{info.experiment_id}/runs/{info.run_id}"
    link = f"[{info.run_id[:8]}]({page})" if server.startswith("http") else info.run_id[:8]
    return Worked(tags.get(STAGE_TAG, info.run_name), info.status, seconds, tags.get(OUTPUT_TAG, ""), link)


def _clean_up() -> list[str]:
    """Delete the run's jobs where this is a pod of a cluster that has such; returns what was deleted."""
    from http import HTTPStatus

    if not os.environ.get("KUBERNETES_SERVICE_HOST") or not run_id():
        return []
    from shellv_core.cluster.connection import ApiError
    from shellv_core.cluster.launcher import delete_jobs

    try:
        return [f"deleted the TrainJob {name}" for name in delete_jobs(run_id())]
    except ApiError as error:
        if error.status == HTTPStatus.NOT_FOUND:  # no Kubeflow Trainer, no jobs
            return []
        raise
