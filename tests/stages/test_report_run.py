from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from shellv_core.cluster.connection import ApiError
from shellv_core.errors import ClusterError, DataError
from shellv_core.stages.report_run import ReportRunConfig, run
from shellv_core.stages.runner import StageConfig, StageRun, run_stage

FAILED = ReportRunConfig(root_uri="s3://shellv/x", state="FAILED", error="Task exit-handler-1 failed.")


def stage(folder: Path, seed: int, body: Any = lambda run: None) -> None:
    run_stage("prepare_data", StageConfig(output_uri=f"{folder.as_uri()}/{{fingerprint}}", seed=seed), body)


def test_the_stages_of_this_run_are_told_from_those_of_others(
    tracking_store: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(run: StageRun[StageConfig]) -> None:
        raise DataError("no pictures")

    monkeypatch.setenv("KFP_RUN_ID", "earlier")
    stage(tmp_path, 1)
    monkeypatch.setenv("KFP_RUN_ID", "this")
    stage(tmp_path, 1)  # there already
    stage(tmp_path, 2)
    with pytest.raises(DataError):
        stage(tmp_path, 3, fails)
    text = run(FAILED)
    assert text.startswith("# Run failed\n")
    assert "- run: this\n" in text
    assert "- stage that failed: prepare_data\n" in text
    assert "- error: Task exit-handler-1 failed.\n" in text
    rows = [line.split(" | ")[1] for line in text.splitlines() if line.startswith("| prepare_data")]
    assert rows == ["FINISHED", "FAILED"]


def test_a_report_comes_also_without_mlflow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KFP_RUN_ID", "this")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    text = run(ReportRunConfig(root_uri="s3://shellv", state="SUCCEEDED"))
    assert text.startswith("# Run succeeded\n")
    assert "- stages unknown: " in text


def test_jobs_of_the_run_are_deleted(tracking_store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def delete_jobs(run_id: str) -> list[str]:
        asked.append(run_id)
        return ["sv-1", "sv-2"]

    monkeypatch.setattr("shellv_core.cluster.launcher.delete_jobs", delete_jobs)
    monkeypatch.setenv("KFP_RUN_ID", "this")
    assert "TrainJob" not in run(FAILED), "this is no pod of a cluster"
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    assert "- deleted the TrainJob sv-2\n" in run(FAILED)
    assert asked == ["this"]


@pytest.mark.parametrize("status", [403, 404])
def test_a_cluster_without_trainer_is_no_fault_but_one_that_refuses_is(
    status: int, tracking_store: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def delete_jobs(run_id: str) -> list[str]:
        raise ApiError("refused", status, "")

    monkeypatch.setattr("shellv_core.cluster.launcher.delete_jobs", delete_jobs)
    monkeypatch.setenv("KFP_RUN_ID", "this")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    if status == 404:
        assert run(FAILED)
        return
    with pytest.raises(ClusterError):
        run(FAILED)
