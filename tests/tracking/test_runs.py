"""Where a stage's values go: to the run that Kubeflow opened, or to one of its own."""

import json
import logging
import uuid

import pytest

from shellv_core.errors import TrackingError
from shellv_core.tracking import runs
from shellv_core.tracking.runs import EXPERIMENT, open_client, track

PARAMS = {"seed": 0, "root_uri": "s3://b", "training": {"max_steps": 9}}


@pytest.fixture
def client(tracking_service):
    return open_client()


@pytest.fixture
def kubeflow(client, monkeypatch):
    """What the MLflow plugin of Kubeflow Pipelines gives a task: a parent, a run nested in it, and three variables."""
    experiment = client.create_experiment(f"kubeflow-{uuid.uuid4().hex}")
    parent = client.create_run(experiment, run_name="pipeline").info.run_id
    nested = client.create_run(experiment, run_name="task", tags={"mlflow.parentRunId": parent}).info.run_id
    monkeypatch.setenv("MLFLOW_RUN_ID", nested)
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", experiment)
    return Kubeflow(client, experiment, parent, nested)


class Kubeflow:
    def __init__(self, client, experiment, parent, nested):
        self.client, self.experiment, self.parent, self.nested = client, experiment, parent, nested

    def task(self):
        return self.client.get_run(self.nested)

    def runs(self):
        return {run.info.run_id for run in self.client.search_runs([self.experiment])}

    def end_task(self, status, parameters):
        """What its launcher does after the user's container: parameters as JSON in one request, then the status."""
        from mlflow.entities import Metric, Param

        params = [Param(key, json.dumps(value)) for key, value in parameters.items()]
        self.client.log_batch(self.nested, metrics=[Metric("promoted", 1.0, 0, 0)], params=params)
        self.client.set_terminated(self.nested, status)


def test_a_stage_writes_to_the_run_that_kubeflow_opened(kubeflow):
    with track("finetune", PARAMS, {"shellv.fingerprint": "f"}) as run:
        run.log_metrics({"loss": 2.0}, step=1)
        assert run.run_id == kubeflow.nested
    task = kubeflow.task()
    assert task.info.status == "RUNNING", "its launcher ends it"
    assert task.data.metrics == {"loss": 2.0}
    assert task.data.tags["shellv.stage"] == "finetune"
    assert task.data.tags["mlflow.parentRunId"] == kubeflow.parent
    assert task.data.params == {"config.seed": "0", "config.root_uri": "s3://b", "config.training.max_steps": "9"}
    assert kubeflow.runs() == {kubeflow.parent, kubeflow.nested}, "neither a second parent nor a run of its own"
    # A name that both write would make MLflow refuse the launcher's whole request.
    kubeflow.end_task("FINISHED", {"root_uri": "s3://b", "preset": "nano", "seed": 0})
    assert kubeflow.task().data.params["root_uri"] == '"s3://b"'
    assert kubeflow.task().data.metrics["promoted"] == 1.0


def fail(stage, params, error):
    with track(stage, params, {}) as run:
        run.log_metrics({"loss": 2.0}, step=1)
        raise error


def test_a_retry_goes_on_in_the_same_run(kubeflow, caplog):
    with pytest.raises(ZeroDivisionError):
        fail("finetune", PARAMS, ZeroDivisionError)
    assert kubeflow.task().info.status == "RUNNING"
    kubeflow.end_task("FAILED", {"preset": "nano"})
    with caplog.at_level(logging.WARNING), track("finetune", {**PARAMS, "seed": 1, "more": True}, {}) as run:
        run.log_metrics({"loss": 1.0}, step=2)
    task = kubeflow.task()
    assert task.data.metrics["loss"] == 1.0
    assert (task.data.params["config.seed"], task.data.params["config.more"]) == ("0", "True")
    assert "keeps what an earlier try recorded of config.seed;" in caplog.text
    assert task.info.status == "FAILED", "its launcher says how it ends"
    assert kubeflow.runs() == {kubeflow.parent, kubeflow.nested}


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda kubeflow: kubeflow.client.set_terminated(kubeflow.nested, "FINISHED"), "has succeeded already"),
        (lambda kubeflow: kubeflow.client.delete_run(kubeflow.nested), "is a deleted run"),
        (None, "is no run of MLflow at"),
    ],
)
def test_a_run_that_takes_nothing_more_is_refused(kubeflow, monkeypatch, spoil, message):
    if spoil:
        spoil(kubeflow)
    else:
        monkeypatch.setenv("MLFLOW_RUN_ID", "0" * 32)
    before = kubeflow.runs()
    with pytest.raises(TrackingError, match=f"MLFLOW_RUN_ID=.* {message}.*Unset MLFLOW_RUN_ID"), track("x", {}, {}):
        pytest.fail("the stage began")
    assert kubeflow.runs() == before


def test_a_run_of_its_own_in_the_named_experiment(kubeflow, monkeypatch):
    monkeypatch.delenv("MLFLOW_RUN_ID")
    with track("evaluate", PARAMS, {}) as run:
        pass
    info = kubeflow.client.get_run(run.run_id)
    assert (info.info.experiment_id, info.info.run_name, info.info.status) == (
        kubeflow.experiment,
        "evaluate",
        "FINISHED",
    )
    assert info.data.params == {"seed": "0", "root_uri": "s3://b", "training.max_steps": "9"}
    assert kubeflow.runs() == {kubeflow.parent, kubeflow.nested, run.run_id}


def test_an_experiment_that_is_gone_is_refused(kubeflow, monkeypatch):
    monkeypatch.delenv("MLFLOW_RUN_ID")
    kubeflow.client.delete_experiment(kubeflow.experiment)
    with pytest.raises(TrackingError, match="names a deleted experiment"), track("x", {}, {}):
        pass
    monkeypatch.setenv("MLFLOW_EXPERIMENT_ID", "987654321")
    with pytest.raises(TrackingError, match="MLFLOW_EXPERIMENT_ID=987654321 names a missing"), track("x", {}, {}):
        pass


@pytest.mark.parametrize(("error", "status"), [(ValueError, "FAILED"), (KeyboardInterrupt, "KILLED")])
def test_how_its_own_run_ends(client, error, status):
    stage = uuid.uuid4().hex
    with pytest.raises(error):
        fail(stage, {}, error)
    experiment = client.get_experiment_by_name(EXPERIMENT).experiment_id
    (ended,) = client.search_runs([experiment], f"tags.`shellv.stage` = '{stage}'")
    assert (ended.info.status, ended.data.metrics) == (status, {"loss": 2.0})


def test_training_outlives_a_store_that_is_away(tmp_path, tracking_store, monkeypatch, caplog):
    monkeypatch.setattr(runs, "FLUSH_SECONDS", 0.0)
    with track("finetune", {}, {}) as run:
        run.log_metrics({"loss": 3.0}, step=0)
        # The database goes away for real: what SQLite opens in its place has no tables.
        run.client._tracking_client.store.engine.dispose()
        tracking_store.rename(tmp_path / "away.db")
        for step in range(1, 4):
            run.log_metrics({"loss": 3.0 - step / 2}, step=step)
        run.client._tracking_client.store.engine.dispose()
        (tmp_path / "away.db").replace(tracking_store)
    history = open_client().get_metric_history(run.run_id, "loss")
    assert [(each.step, each.value) for each in history] == [(0, 3.0), (1, 2.5), (2, 2.0), (3, 1.5)]
    assert caplog.text.count("Metrics are kept and sent later") == 1, "it is not asked again at every step"
