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


class TaskFailedError(ShellVError):
    """A task of the pipeline failed; the message is its stage's."""


@dataclass(frozen=True)
class LocalRun:
    """What a run on this machine made.

    Attributes:
        outputs: URIs of the pipeline's outputs, by their names.
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

    registered_model = stage_config(preset, "promote", overrides).registered_model
    references = home() / "kfp"
    _refuse_python3([*overrides, registered_model, root_uri or "", str(home())])
    arguments = {"preset": preset, "overrides": list(overrides), "registered_model": registered_model}
    shutil.rmtree(references, ignore_errors=True)
    with _object_store(root_uri) as root:
        outputs, console = run_tasks("shellv", {"root_uri": root, **arguments}, references)
        evaluation = InputDirectory(outputs["evaluation_uri"])
        report_path = home() / "report.html"
        shutil.copyfile(evaluation.fetch("report.html"), report_path)
        return LocalRun(
            outputs=outputs,
            results=json.loads(evaluation.fetch("results.json").read_bytes()),
            promotion=InputDirectory(outputs["promotion_uri"]).manifest,
            deployment=InputDirectory(outputs["deployment_uri"]).manifest,
            report_path=report_path,
            seconds={task.name: task.seconds for task in console.tasks},
        )


def run_tasks(name: str, arguments: Mapping[str, Any], references: Path) -> tuple[dict[str, str], Console]:
    """Run the compiled pipeline `name` and show its progress on standard output.

    Args:
        arguments: the pipeline's parameters.
        references: folder for the tasks' artifacts.

    Returns:
        The pipeline's outputs, and its tasks.

    Raises:
        TaskFailedError: if a task fails.
    """
    import yaml
    from kfp import components, local
    from kfp.local.config import LocalExecutionConfig

    # The second document, about placement, means nothing here.
    document = next(yaml.safe_load_all(compiled_yaml(name)))
    graphs = [document["root"]["dag"], *(each["dag"] for each in document["components"].values() if "dag" in each)]
    tasks = [task for graph in graphs for task in graph["tasks"].values()]
    for task in tasks:
        task.pop("retryPolicy", None)
    titles = {task["componentRef"]["name"].removeprefix("comp-"): task["taskInfo"]["name"] for task in tasks}
    log_path = home() / "logs" / "run.log"
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        console = Console(sys.stdout, stack.enter_context(log_path.open("w", encoding="utf-8")), titles)
        stack.enter_context(_temporary_folder())
        stack.enter_context(warnings.catch_warnings())
        # kfp warns of every setting that only a cluster heeds, and of an image that is not used here.
        warnings.filterwarnings("ignore", module=r"kfp\.")
        local.init(local.SubprocessRunner(use_venv=False), pipeline_root=str(references))
        stack.callback(setattr, LocalExecutionConfig, "instance", None)
        stack.enter_context(contextlib.redirect_stdout(console))
        try:
            pipeline = components.load_component_from_text(yaml.safe_dump(document))
            return dict(pipeline(**arguments).outputs), console
        except RuntimeError as error:
            failed = next((task for task in console.tasks if task.failure), None)
            if failed is None:
                raise
            raise TaskFailedError(f"{failed.name}: {failed.failure} (All output of the run: {log_path})") from error


def _refuse_python3(values: Sequence[str]) -> None:
    for value in values:
        if "python3" in value:
            raise ConfigError(
                f"{value!r} contains the text 'python3', which kfp.local replaces by the interpreter's path wherever it"
                " stands. Choose a name or folder (SHELLV_HOME) without it."
            )


@contextlib.contextmanager
def _object_store(root_uri: str | None) -> Iterator[str]:
    from shellv_core.storage.seaweedfs import BUCKET, embedded_s3, external_s3_configured

    if external_s3_configured() or (root_uri and not root_uri.startswith("s3://")):
        yield (root_uri or f"s3://{BUCKET}").rstrip("/")
        return
    with embedded_s3() as bucket:
        yield (root_uri or f"s3://{bucket}").rstrip("/")


@contextlib.contextmanager
def _temporary_folder() -> Iterator[None]:
    """A TMPDIR for the tasks: kfp leaves a folder behind for each."""
    previous = os.environ.get("TMPDIR")
    with tempfile.TemporaryDirectory(prefix="shellv-") as folder:
        os.environ["TMPDIR"] = folder
        try:
            yield
        finally:
            if previous is None:
                del os.environ["TMPDIR"]
            else:
                os.environ["TMPDIR"] = previous
