"""MLflow runs: one for each stage that does work.

Knows nothing of stages' contents. Inside a Kubeflow run whose MLflow plugin made a run already (MLFLOW_RUN_ID), the
stage's values go to that one.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shellv_core.errors import Preempted, TrackingError
from shellv_core.storage import home

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "shellv"
FLUSH_SECONDS = 5.0
MAX_PARAM_LENGTH = 500


def tracking_uri() -> str:
    """MLFLOW_TRACKING_URI, by default an SQLite file below the project folder."""
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    if configured:
        return configured
    home().mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{home() / 'mlflow.db'}"


def open_client() -> MlflowClient:
    """A client of the tracking store and registry.

    Raises:
        TrackingError: if the store does not answer within seconds.
    """
    # MLflow's defaults keep a caller waiting for minutes when the server is down.
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
    import logging

    logging.getLogger("alembic").setLevel(logging.WARNING)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    uri = tracking_uri()
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        _ensure_database(home() / "mlflow.db")
    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    try:
        client.search_experiments(max_results=1)
    except (MlflowException, OSError) as error:
        raise TrackingError(
            f"MLflow at {uri} does not answer ({str(error).splitlines()[0]}). Check MLFLOW_TRACKING_URI, or unset it"
            " to use a local SQLite file."
        ) from None
    return client


def _ensure_database(path: Path) -> None:
    """Create the tables beside `path` and move them there whole.

    A kill amid MLflow's migrations leaves a file that it cannot open; replacing a database that another process has
    made in the meantime, and opened, makes it read-only there.
    """
    from mlflow.tracking import MlflowClient

    if path.exists():
        return
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    MlflowClient(tracking_uri=f"sqlite:///{unfinished}").search_experiments(max_results=1)
    with contextlib.suppress(FileExistsError):
        os.link(unfinished, path)
    unfinished.unlink()


class TrackedRun:
    """An open MLflow run; metrics are sent in batches."""

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self._pending: list[Any] = []
        self._last_flush = time.monotonic()

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record `metrics` at `step`; they reach the store within seconds."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(key, float(value), now, step) for key, value in metrics.items()]
        if time.monotonic() - self._last_flush > FLUSH_SECONDS:
            self.flush()

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Record settings; nested mappings become dotted names."""
        from mlflow.entities import Param

        flat = [Param(key, str(value)[:MAX_PARAM_LENGTH]) for key, value in flatten(params).items()]
        for start in range(0, len(flat), 100):
            self.client.log_batch(self.run_id, params=flat[start : start + 100])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run."""
        for key, value in tags.items():
            self.client.set_tag(self.run_id, key, value)

    def log_file(self, path: Path) -> None:
        """Keep a local file as an artifact of the run.

        Raises:
            TrackingError: if the store does not take it.
        """
        from mlflow.exceptions import MlflowException

        try:
            self.client.log_artifact(self.run_id, str(path))
        except (MlflowException, OSError) as error:
            raise TrackingError(
                f"MLflow at {tracking_uri()} does not take {path.name} as an artifact ({str(error).splitlines()[0]})."
                " Check the artifact store of its experiment."
            ) from None

    def flush(self) -> None:
        """Send what is pending."""
        for start in range(0, len(self._pending), 1000):
            self.client.log_batch(self.run_id, metrics=self._pending[start : start + 1000])
        self._pending, self._last_flush = [], time.monotonic()


@contextlib.contextmanager
def track(stage: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[TrackedRun]:
    """Open a run named `stage`; it ends FINISHED, FAILED if the body raises, or KILLED if it was asked to stop.

    Raises:
        TrackingError: if the store does not answer.
    """
    client = open_client()
    attached = os.environ.get("MLFLOW_RUN_ID")
    if attached:
        run_id = attached
    else:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        experiment_id = experiment.experiment_id if experiment else _create_experiment(client)
        run_id = client.create_run(experiment_id, run_name=stage).info.run_id
    run = TrackedRun(client, run_id)
    run.set_tags({"shellv.stage": stage, **tags})
    if not attached:
        run.log_params(params)
    try:
        yield run
    except BaseException as error:
        run.flush()
        if not attached:
            killed = isinstance(error, (Preempted, KeyboardInterrupt))
            client.set_terminated(run_id, status="KILLED" if killed else "FAILED")
        raise
    run.flush()
    if not attached:
        client.set_terminated(run_id, status="FINISHED")


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def _create_experiment(client: MlflowClient) -> str:
    from mlflow.exceptions import MlflowException

    local = tracking_uri().startswith("sqlite:")
    location = (home() / "mlflow-artifacts").as_uri() if local else None
    try:
        return str(client.create_experiment(EXPERIMENT, artifact_location=location))
    except MlflowException:
        # Another stage made it in the meantime.
        experiment = client.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            raise
        return str(experiment.experiment_id)
