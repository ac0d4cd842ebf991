"""Run pipelines on this machine: `kfp.local` with one process for each task, on the project's own S3 server.

They are the same pipelines that a cluster runs; only retries are taken out, so that a fault is shown at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pipelines.compile import compiled_yaml
from pipelines.console import Console
from shellv_core.errors import ConfigError, ShellVError
from shellv_core.storage import InputDirectory, Manifest, home

DEFAULT_PRESET = "nano"
RUN_VARIABLE = "KFP_RUN_ID"


class TaskFailedError(ShellVError):
    """A task of the pipeline failed; the message is its stage's."""


@dataclass(frozen=True)
class LocalRun:
    """What a run on this machine made.

    Attributes:
        outputs: URI of each stage's output, by kfp's name of the task.
        results: evaluate's ``results.json``.
        promotion, deployment: what promote and deploy recorded.
        report_path: the report, as a local file.
        seconds: wall-clock time of each task, in the order of the run.
    """

    outputs: dict[str, str]
    results: dict[str, Any]
    promotion: Manifest
    deployment: Manifest
    report_path: Path
    seconds: dict[str, float]


def run(preset: str = DEFAULT_PRESET, overrides: Sequence[str] = (), root_uri: str | None = None) -> LocalRun:
    """Run all tasks one after another, show their progress on standard output and fetch the report.

    Args:
        overrides: ``STAGE.key=value`` strings.
        root_uri: folder of all outputs; by default the bucket ``shellv`` of the S3 service that the environment
            names, or of the embedded one.

    Raises:
        ConfigError: if a setting is wrong, before anything starts.
        TaskFailedError: if a task fails.
    """
    from shellv_core.stages.presets import stage_config

    stage_config(preset, "prepare_data", overrides)
    refuse_python3([*overrides, root_uri or "", str(home())])
    with object_store(root_uri) as root:
        return run_at(root, preset, overrides, compiled_yaml("shellv"))


def run_at(root_uri: str, preset: str, overrides: Sequence[str], compiled: str, runner: Any = None) -> LocalRun:
    """As `run`, on an object store that is up.

    Args:
        root_uri: folder of all outputs.
        compiled, runner: see `run_tasks`.
    """
    # Where to deploy to is the settings' business here, and a cluster's elsewhere.
    arguments = {"root_uri": root_uri, "preset": preset, "overrides": list(overrides), "deploy_target": ""}
    outputs, console = run_tasks(compiled, arguments, runner)
    evaluation = InputDirectory(outputs["evaluate"])
    report_path = home() / "report.html"
    shutil.copyfile(evaluation.fetch("report.html"), report_path)
    return LocalRun(
        outputs=outputs,
        results=json.loads(evaluation.fetch("results.json").read_bytes()),
        promotion=InputDirectory(outputs["promote"]).manifest,
        deployment=InputDirectory(outputs["deploy"]).manifest,
        report_path=report_path,
        seconds={task.name: task.seconds for task in console.tasks},
    )


def run_tasks(compiled: str, arguments: Mapping[str, Any], runner: Any = None) -> tuple[dict[str, Any], Console]:
    """Run a compiled pipeline and show its progress on standard output.

    Args:
        compiled: its YAML.
        arguments: its parameters.
        runner: of `kfp.local`, for tasks in containers, which are retried as on a cluster; by default each task is a
            process, and its first fault ends the run.

    Returns:
        What each task returned, by kfp's name of it, and the tasks.

    Raises:
        TaskFailedError: if a task fails.
    """
    import yaml
    from kfp import components, local
    from kfp.local.config import LocalExecutionConfig

    # The second document, about placement, means nothing here.
    document = next(yaml.safe_load_all(compiled))
    titles = _titles(document)
    (_without_delays if runner else _without_retries)(document)
    references = home() / "kfp"
    shutil.rmtree(references, ignore_errors=True)
    references.mkdir(parents=True)
    if runner:
        # Containers have users of their own.
        references.chmod(0o777)
    log_path = home() / "logs" / "run.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        console = Console(sys.stdout, stack.enter_context(log_path.open("w", encoding="utf-8")), titles)
        stack.enter_context(_task_environment())
        stack.enter_context(warnings.catch_warnings())
        # kfp warns of every setting that only a cluster heeds, and of an image that is not used here.
        warnings.filterwarnings("ignore", module=r"kfp\.")
        local.init(runner or local.SubprocessRunner(use_venv=False), pipeline_root=str(references))
        stack.callback(setattr, LocalExecutionConfig, "instance", None)
        stack.enter_context(contextlib.redirect_stdout(console))
        try:
            pipeline = components.load_component_from_text(yaml.safe_dump(document))
            pipeline(**arguments)
            return _returned(references), console
        except RuntimeError as error:
            failed = next((task for task in console.tasks if task.failure), None)
            if failed is None:
                raise
            raise TaskFailedError(f"{failed.name}: {failed.failure} (All output of the run: {log_path})") from error


def _graphs(document: dict[str, Any]) -> list[dict[str, Any]]:
    return [document["root"]["dag"], *(each["dag"] for each in document["components"].values() if "dag" in each)]


def _titles(document: dict[str, Any]) -> dict[str, str]:
    """What to call each task, by kfp's name of it."""
    titles = {}
    for graph in _graphs(document):
        for task in graph["tasks"].values():
            name = task["componentRef"]["name"]
            if "executorLabel" in document["components"][name]:
                titles[name.removeprefix("comp-")] = task["taskInfo"]["name"]
    return titles


def _without_retries(document: dict[str, Any]) -> None:
    """Take out of a pipeline what only containers need."""
    for graph in _graphs(document):
        for task in graph["tasks"].values():
            task.pop("retryPolicy", None)
    for executor in document["deploymentSpec"]["executors"].values():
        # No image runs here, so that none may be recorded.
        environment = executor["container"]["env"]
        environment[:] = [each for each in environment if each["name"] != "SHELLV_IMAGE"]


def _without_delays(document: dict[str, Any]) -> None:
    """Let failed tasks be retried at once: there is no other machine to wait for."""
    for graph in _graphs(document):
        for task in graph["tasks"].values():
            if "retryPolicy" in task:
                task["retryPolicy"]["backoffDuration"] = "0s"


def _returned(references: Path) -> dict[str, Any]:
    """What each task returned: a pipeline with an exit handler has no outputs of its own."""
    returned = {}
    for path in references.glob("*/*/executor_output.json"):
        values = json.loads(path.read_text(encoding="utf-8")).get("parameterValues", {})
        if "Output" in values:
            returned[path.parent.name] = values["Output"]
    return returned


def refuse_python3(values: Sequence[str]) -> None:
    """Raise `ConfigError` if a value holds the text that `kfp.local` replaces."""
    for value in values:
        if "python3" in value:
            raise ConfigError(
                f"{value!r} contains the text 'python3', which kfp.local replaces by the interpreter's path wherever it"
                " stands. Choose a name or folder (SHELLV_HOME) without it."
            )


@contextlib.contextmanager
def object_store(root_uri: str | None) -> Iterator[str]:
    """The folder of all outputs, `root_uri` or the bucket of the S3 service, of which the embedded one is started."""
    from shellv_core.storage.seaweedfs import BUCKET, embedded_s3, external_s3_configured

    if external_s3_configured() or (root_uri and not root_uri.startswith("s3://")):
        yield (root_uri or f"s3://{BUCKET}").rstrip("/")
        return
    with embedded_s3() as bucket:
        yield (root_uri or f"s3://{bucket}").rstrip("/")


@contextlib.contextmanager
def _task_environment() -> Iterator[None]:
    """A TMPDIR for the tasks, as kfp leaves a folder behind for each, and an id for the run."""
    with tempfile.TemporaryDirectory(prefix="shellv-") as folder:
        given = {"TMPDIR": folder, RUN_VARIABLE: f"local-{Path(folder).name.removeprefix('shellv-')}"}
        previous = {name: os.environ.get(name) for name in given}
        os.environ.update(given)
        try:
            yield
        finally:
            for name, value in previous.items():
                if value is None:
                    del os.environ[name]
                else:
                    os.environ[name] = value
