"""The training stages' report: an artifact of the MLflow run, beside its charts.

It is no part of a stage's output: it holds timings, and later stages are reused by the content of their input, which
is the same from run to run.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shellv_core.stages.runner import StageRun

if TYPE_CHECKING:
    from shellv_core.training.config import TrainingConfig
    from shellv_core.training.model import TrainingModel

REPORT_NAME = "report.html"


def put_report(stage: str, run: StageRun[Any], module: TrainingModel, training: TrainingConfig) -> None:
    """Make the report of a finished training, from what its processes have logged."""
    from shellv_core.logs import get_logger
    from shellv_core.tracking.runs import flatten
    from shellv_core.training.history import HISTORY_NAME, read_history
    from shellv_core.training.parts import describe_parts
    from shellv_core.training.report import render_training_report

    report = render_training_report(
        stage,
        read_history(run.work / "checkpoints" / HISTORY_NAME),
        describe_parts(module, training),
        {
            "Run": {"fingerprint": run.fingerprint, "output": run.output.uri, "MLflow run": run.tracked.run_id},
            "Settings": flatten(run.config.model_dump(mode="json")),
        },
    )
    path = run.work / REPORT_NAME
    path.write_text(report, encoding="utf-8")
    run.tracked.log_file(path)
    get_logger(__name__).info("%s: the training report is an artifact of MLflow run %s", stage, run.tracked.run_id)
