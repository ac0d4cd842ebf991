"""Runs on a server: create, find, list, terminate."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any

from pipelines.client.connection import Server
from pipelines.client.outcome import FINAL_STATES
from pipelines.client.versions import UploadedVersion, named

MAX_COMPARED = 20


@dataclass(frozen=True)
class RunSettings:
    """How a pipeline runs, beside its parameters.

    Attributes:
        experiment: name of the experiment, which is created where it is missing.
        parameters: values of the pipeline's parameters.
        service_account: Kubernetes service account of the tasks; empty for the server's own.
        pipeline_root: folder of the artifacts; empty for the server's own.
        mlflow_experiment: experiment of the server's MLflow plugin; empty for the plugin's own.
    """

    experiment: str
    parameters: Mapping[str, Any] = field(default_factory=dict)
    service_account: str = ""
    pipeline_root: str = ""
    mlflow_experiment: str = ""

    def fields(self, server: Server, version: UploadedVersion) -> dict[str, Any]:
        """The fields that a run and a recurring run have in common."""
        import kfp_server_api

        return {
            "experiment_id": experiment_id(server, self.experiment),
            "pipeline_version_reference": kfp_server_api.V2beta1PipelineVersionReference(
                pipeline_id=version.pipeline_id, pipeline_version_id=version.version_id
            ),
            "runtime_config": kfp_server_api.V2beta1RuntimeConfig(
                parameters=dict(self.parameters), pipeline_root=self.pipeline_root or None
            ),
            "service_account": self.service_account or None,
            # kfp's own methods have no argument for it.
            "plugins_input": (
                {"mlflow": {"experiment_name": self.mlflow_experiment}} if self.mlflow_experiment else None
            ),
        }


def run_name(pipeline: str) -> str:
    """A name for a run: the pipeline's and the time."""
    return f"{pipeline} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}"


def create_run(server: Server, name: str, version: UploadedVersion, settings: RunSettings) -> Any:
    """Start a run, exactly one even where answers get lost.

    Returns:
        The server's ``V2beta1Run``.

    Raises:
        PipelineServerError: if the server refuses or does not answer.
    """
    import kfp_server_api

    fields = settings.fields(server, version)
    # Names need not be unique: this mark tells our run from another of the same name after a lost answer.
    mark = f"version {version.name}, submission {uuid.uuid4().hex}"
    wanted = kfp_server_api.V2beta1Run(display_name=name, description=mark, **fields)

    def find() -> Any:
        listing = server.client.runs.run_service_list_runs
        runs = server.pages(listing, "runs", experiment_id=fields["experiment_id"], filter=named(name))
        return next((run for run in runs if run.description == mark), None)

    return server.once(lambda: server.client.runs.run_service_create_run(wanted), find)


def experiment_id(server: Server, name: str) -> str:
    """The id of the experiment `name`, which is created where it is missing."""
    import kfp_server_api

    arguments: dict[str, Any] = {"namespace": server.namespace} if server.namespace else {}

    def find() -> Any:
        listing = server.client.experiments.experiment_service_list_experiments
        return next(server.pages(listing, "experiments", filter=named(name), **arguments), None)

    wanted = kfp_server_api.V2beta1Experiment(display_name=name, namespace=server.namespace)
    found = find() or server.once(lambda: server.client.experiments.experiment_service_create_experiment(wanted), find)
    return str(found.experiment_id)


def get_run(server: Server, run_id: str) -> Any:
    """The server's ``V2beta1Run``."""
    with server.talking():
        return server.client.runs.run_service_get_run(run_id)


def latest_runs(server: Server, count: int, **where: Any) -> list[Any]:
    """The newest `count` runs; `where` may name an ``experiment_id``."""
    if server.namespace and "experiment_id" not in where:
        where["namespace"] = server.namespace
    runs = server.pages(
        server.client.runs.run_service_list_runs, "runs", size=min(count, 100), sort_by="created_at desc", **where
    )
    return list(itertools.islice(runs, count))


def terminate_run(server: Server, run_id: str) -> str:
    """Ask the server to end a run; returns the state that it was in. Nothing happens to a run that has ended."""
    state = str(get_run(server, run_id).state)
    if state in FINAL_STATES or state == "CANCELING":
        return state

    def ended() -> Any:
        now = get_run(server, run_id).state
        return now if now in FINAL_STATES or now == "CANCELING" else None

    server.once(lambda: server.client.runs.run_service_terminate_run(run_id), ended)
    return state


def similar_run(server: Server, run: Any) -> Any:
    """The newest run of the same experiment that succeeded with the same pipeline and preset; None if there is none."""

    def kind(each: Any) -> tuple[Any, Any]:
        reference, config = each.pipeline_version_reference, each.runtime_config
        return (
            reference.pipeline_id if reference else None,
            (config.parameters or {}).get("preset") if config else None,
        )

    earlier = latest_runs(server, MAX_COMPARED, experiment_id=run.experiment_id)
    good = (each for each in earlier if each.state == "SUCCEEDED" and each.run_id != run.run_id)
    return next((each for each in good if kind(each) == kind(run)), None)
