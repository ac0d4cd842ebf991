"""MLflow runs: one for each stage that does work.

Knows nothing of stages' contents. Inside a Kubeflow run whose MLflow plugin made a run already (MLFLOW_RUN_ID), the
stage's values go to that one, and Kubeflow alone ends it.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shellv_core.errors import Preempted, TrackingError
from shellv_core.logs import get_logger
from shellv_core.storage import home

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient

EXPERIMENT = "shellv"
FLUSH_SECONDS = 5.0
RETRY_SECONDS = 60.0  # after a store that did not take metrics
MAX_PARAM_LENGTH = 500
#: Before the names of settings in a run that Kubeflow opened. Its launcher logs the task's parameters as JSON when the
#: task ends; MLflow refuses a second value of a name, and with it everything that comes in the same request.
ATTACHED_PREFIX = "config."
NOT_FOUND = ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE")

logger = get_logger(__name__)


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
    """An open MLflow run; metrics are sent in batches.

    Raises:
        TrackingError: if MLflow refuses or does not answer, in every method but `log_metrics`.
    """

    def __init__(self, client: MlflowClient, run_id: str) -> None:
        self.client, self.run_id = client, run_id
        self._pending: list[Any] = []
        self._next_flush = time.monotonic() + FLUSH_SECONDS

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record `metrics` at `step`; they reach the store within seconds, or later where it does not answer."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        self._pending += [Metric(key, float(value), now, step) for key, value in metrics.items()]
        if time.monotonic() < self._next_flush:
            return
        try:
            self.flush()
        except TrackingError as error:
            # Hours of training are worth more than its curve.
            logger.warning("%s Metrics are kept and sent later.", error)
            self._next_flush = time.monotonic() + RETRY_SECONDS

    def log_params(self, params: Mapping[str, Any], prefix: str = "") -> None:
        """Record settings; nested mappings become dotted names.

        A name that has a value already keeps it, since MLflow refuses another one: an earlier try of a task whose
        settings have changed since has left it there.
        """
        from mlflow.entities import Param

        flat = {key: str(value)[:MAX_PARAM_LENGTH] for key, value in flatten(params, prefix).items()}
        with _store_errors():
            there = self.client.get_run(self.run_id).data.params
            if changed := [key for key, value in flat.items() if there.get(key, value) != value]:
                logger.warning(
                    "MLflow run %s keeps what an earlier try recorded of %s; this try's values are in the output's"
                    " manifest",
                    self.run_id,
                    ", ".join(changed),
                )
            new = [Param(key, value) for key, value in flat.items() if key not in there]
            for start in range(0, len(new), 100):
                self.client.log_batch(self.run_id, params=new[start : start + 100])

    def set_tags(self, tags: Mapping[str, str]) -> None:
        """Set tags on the run."""
        with _store_errors():
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
        """Send what is pending; what cannot be sent stays pending."""
        with _store_errors():
            while self._pending:
                self.client.log_batch(self.run_id, metrics=self._pending[:1000])
                del self._pending[:1000]
        self._next_flush = time.monotonic() + FLUSH_SECONDS


@contextlib.contextmanager
def track(stage: str, params: Mapping[str, Any], tags: Mapping[str, str]) -> Iterator[TrackedRun]:
    """Record a stage: in the run that MLFLOW_RUN_ID names, else in one of its own, named `stage`.

    Its own ends FINISHED, FAILED if the body raises, or KILLED if it was asked to stop; it is in the experiment that
    MLFLOW_EXPERIMENT_ID names, else in `EXPERIMENT`.

    Raises:
        TrackingError: if the store does not answer, or there is no such run or experiment to write to.
    """
    client = open_client()
    attached = os.environ.get("MLFLOW_RUN_ID")
    if attached:
        run = TrackedRun(client, _attachable(client, attached))
    else:
        with _store_errors():
            run = TrackedRun(client, client.create_run(_experiment_id(client), run_name=stage).info.run_id)
    run.set_tags({"shellv.stage": stage, **tags})
    run.log_params(params, ATTACHED_PREFIX if attached else "")
    try:
        yield run
    except BaseException as error:
        # What the body raised is what the user must hear of.
        with contextlib.suppress(TrackingError):
            run.flush()
            if not attached:
                killed = isinstance(error, (Preempted, KeyboardInterrupt))
                _end(run, "KILLED" if killed else "FAILED")
        raise
    run.flush()
    if not attached:
        _end(run, "FINISHED")


def _end(run: TrackedRun, status: str) -> None:
    with _store_errors():
        run.client.set_terminated(run.run_id, status=status)


def _attachable(client: MlflowClient, run_id: str) -> str:
    """The id of a run that takes this task's values: one that goes on, or an earlier try of the task that failed."""
    from mlflow.exceptions import MlflowException

    unset = "Unset MLFLOW_RUN_ID to let this stage open a run of its own."
    try:
        info = client.get_run(run_id).info
    except MlflowException as error:
        if error.error_code in NOT_FOUND:
            raise TrackingError(
                f"MLFLOW_RUN_ID={run_id} is no run of MLflow at {tracking_uri()}. Check MLFLOW_TRACKING_URI. {unset}"
            ) from None
        raise _fault(error) from None
    if info.lifecycle_stage != "active":
        raise TrackingError(f"MLFLOW_RUN_ID={run_id} is a deleted run. Restore it in MLflow. {unset}")
    if info.status == "FINISHED":
        raise TrackingError(f"MLFLOW_RUN_ID={run_id} is the run of a task that has succeeded already. {unset}")
    logger.info("writing to MLflow run %s (%s)", run_id, info.status)
    return run_id


def _fault(error: Exception) -> TrackingError:
    reason = (str(error).splitlines() or [type(error).__name__])[0]
    return TrackingError(f"MLflow at {tracking_uri()} did not take what this stage records ({reason}).")


@contextlib.contextmanager
def _store_errors() -> Iterator[None]:
    """Raise what MLflow's client raises as `TrackingError`."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except (MlflowException, OSError) as error:
        raise _fault(error) from None


def flatten(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level with dotted names."""
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        flat.update(flatten(value, f"{name}.") if isinstance(value, Mapping) else {name: value})
    return flat


def _experiment_id(client: MlflowClient) -> str:
    named = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if not named:
        experiment = client.get_experiment_by_name(EXPERIMENT)
        return str(experiment.experiment_id) if experiment else _create_experiment(client)
    from mlflow.exceptions import MlflowException

    try:
        lifecycle = str(client.get_experiment(named).lifecycle_stage)
    except MlflowException as error:
        if error.error_code not in NOT_FOUND:
            raise
        lifecycle = "missing"
    if lifecycle != "active":
        raise TrackingError(
            f"MLFLOW_EXPERIMENT_ID={named} names a {lifecycle} experiment of MLflow at {tracking_uri()}. Unset it to"
            f" use the experiment {EXPERIMENT!r}."
        )
    return named


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
