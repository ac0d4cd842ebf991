"""Runs the end-to-end pipeline with every task in a container, and services that are reached over a network."""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from components.images import LOCK_PATH, ImageName, image
from pipelines.compile import compiled_yaml
from pipelines.contained.engine import check_images, docker_api
from pipelines.contained.hardening import hardened
from pipelines.contained.mlflow_server import mlflow_server
from pipelines.contained.network import RunNetwork, run_network
from pipelines.contained.runner import docker_runner_remedied
from pipelines.contained.serving import PORT, ServedChampion
from pipelines.local import DEFAULT_PRESET, LocalRun, run_at
from shellv_core.stages.deploy import REQUEST_NAME
from shellv_core.stages.task import RUN_VARIABLE
from shellv_core.storage import InputDirectory, Manifest, home
from shellv_core.storage.seaweedfs import BUCKET, EmbeddedS3, embedded_s3

#: Below the project folder: data, registry and logs of their own, since their addresses are the network's.
FOLDER = "containers"
PASSED_ON = ("OMP_NUM_THREADS",)


def run(preset: str = DEFAULT_PRESET, overrides: Sequence[str] = ()) -> LocalRun:
    """Run all tasks in containers of the images that `make images` has built, and serve the champion from another.

    Raises:
        ConfigError: if a setting is wrong or there are no images, before anything starts.
        EngineError: if there is no container engine.
        TaskFailedError: if a task fails.
    """
    from shellv_core.stages.presets import stage_config

    model = stage_config(preset, "promote", overrides).registered_model
    control, serve = image("control", LOCK_PATH), image("serve", LOCK_PATH)
    compiled = compiled_yaml("shellv", lock=LOCK_PATH)
    with contextlib.ExitStack() as stack:
        stack.enter_context(_project_folder(home() / FOLDER))
        client = stack.enter_context(docker_api())
        check_images(client, get_args(ImageName))
        network = stack.enter_context(run_network(client, control))
        environment = stack.enter_context(services(network))
        log_path = home() / "logs" / "serve.log"
        server = ServedChampion(client, serve, network, environment, model, log_path)
        url = stack.enter_context(server.following())
        stack.enter_context(docker_runner_remedied())
        settings = ["deploy.target=service", f"deploy.url={url}", *overrides]
        finished = run_at(f"s3://{BUCKET}", preset, settings, compiled, task_runner(network, environment))
        return replace(finished, deployment=_seen_from_here(finished.deployment, finished.outputs["deploy"]))


@contextlib.contextmanager
def services(network: RunNetwork) -> Iterator[dict[str, str]]:
    """S3 and MLflow, up on the network; yields the variables by which tasks and this process reach them."""
    with embedded_s3(address=network.gateway) as bucket:
        environment = EmbeddedS3(home() / "s3").environment()
        with mlflow_server(home(), network.gateway, bucket, environment) as url:
            environment["MLFLOW_TRACKING_URI"] = url
            with _variables(environment):
                yield environment


def task_runner(network: RunNetwork, environment: Mapping[str, str]) -> Any:
    """The runner for `kfp.local`: hardened containers on the network."""
    from kfp.local import DockerRunner

    passed_on = {name: os.environ[name] for name in PASSED_ON if name in os.environ}
    environment = {**passed_on, **environment, RUN_VARIABLE: network.name}
    return DockerRunner(environment=environment, network=network.name, **hardened())


def _seen_from_here(deployment: Manifest, uri: str) -> Manifest:
    """The record of the deployment, with the ways to ask again from outside the containers, after the run."""
    request = home() / "deploy" / REQUEST_NAME
    request.parent.mkdir(exist_ok=True)
    shutil.copyfile(InputDirectory(uri).fetch(REQUEST_NAME), request)
    ways = {
        "serve": f"SHELLV_HOME={shlex.quote(str(home()))} shellv serve --model {deployment.details['model']}",
        "curl": f"curl -s http://127.0.0.1:{PORT}/v1/chat/completions -H 'content-type: application/json'"
        f" -d @{shlex.quote(str(request))}",
    }
    return deployment.model_copy(update={"details": {**deployment.details, **ways}})


@contextlib.contextmanager
def _project_folder(folder: Path) -> Iterator[None]:
    with _variables({"SHELLV_HOME": str(folder)}):
        (folder / "logs").mkdir(parents=True, exist_ok=True)
        yield


@contextlib.contextmanager
def _variables(values: Mapping[str, str]) -> Iterator[None]:
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
