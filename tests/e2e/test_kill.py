"""kill -9 of each stage at several moments, then a rerun: the same result as if nothing had happened."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shellv_core.errors import ObjectNotFoundError
from shellv_core.storage import InputDirectory, list_uris
from tests.e2e.conftest import REPOSITORY, Project
from tests.e2e.test_pipeline import outputs

# The first of them pays for the whole run.
pytestmark = [pytest.mark.e2e, pytest.mark.timeout(900)]

# Seconds of work after which each try is killed; a stage that is done by then was not killed.
KILL_AFTER_SECONDS = (0.0, 1.0, 4.0)


def environment(project: Project, home: Path) -> dict[str, str]:
    s3 = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    return {**project.environment(s3), "SHELLV_HOME": str(home)}


def leftovers(home: Path) -> list[str]:
    """Command lines of processes that still work with the project folder `home`."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if f"SHELLV_HOME={home}".encode() in (process / "environ").read_bytes().split(b"\0"):
                found.append((process / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except OSError:
            continue
    return found


def run_with_kills(project: Project, home: Path, stage: str, output: Path, *settings: str) -> int:
    """Run a stage, killed at every moment of the list, and at last to its end; returns how many kills hit."""
    command = [sys.executable, "-m", "shellv_core.cli", stage, "--preset", "smoke", *settings]
    command.append(f"output_uri={output.as_uri()}")
    kills = 0
    for delay in KILL_AFTER_SECONDS:
        process = subprocess.Popen(
            command,
            cwd=REPOSITORY,
            env=environment(project, home),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and not (output / "_in_progress.json").exists():
            time.sleep(0.02)
        started = time.monotonic()
        while process.poll() is None and time.monotonic() - started < delay:
            time.sleep(0.02)
        if process.poll() is not None:
            break
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
    done = subprocess.run(
        command,
        cwd=REPOSITORY,
        env=environment(project, home),
        capture_output=True,
        text=True,
        timeout=250,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return kills


def inputs_of(stage: str, project: Project) -> list[str]:
    (data,), (model,) = outputs("prepare_data"), outputs("pretrain_projector")
    adapter = outputs("finetune")[0]
    merged = [InputDirectory(uri) for uri in outputs("merge_lora")]
    evaluation = InputDirectory(outputs("evaluate")[0])
    candidate = evaluation.manifest.inputs["model"].uri
    baseline = next(each.uri for each in merged if each.uri != candidate)
    weight = InputDirectory(adapter).manifest.config["hacl"]["weight"]
    return {
        "prepare_data": [],
        "pretrain_projector": [f"data_uri={data}"],
        "finetune": [f"data_uri={data}", f"model_uri={model}", f"hacl.weight={weight}"],
        "merge_lora": [f"adapter_uri={adapter}"],
        "evaluate": [f"data_uri={data}", f"model_uri={candidate}", f"baseline_uri={baseline}"],
        "promote": [f"model_uri={candidate}", f"evaluation_uri={evaluation.uri}", "registered_model=killed"],
    }[stage]


def reference_of(stage: str, settings: list[str]) -> InputDirectory:
    wanted = {part.partition("=")[2] for part in settings}
    for uri in outputs(stage):
        directory = InputDirectory(uri)
        if {each.uri for each in directory.manifest.inputs.values()} <= wanted and (
            stage != "finetune" or f"hacl.weight={directory.manifest.config['hacl']['weight']}" in settings
        ):
            return directory
    raise AssertionError(f"no output of {stage} with inputs {wanted}")


@pytest.mark.usefixtures("project_s3")
@pytest.mark.parametrize(
    "stage", ["prepare_data", "pretrain_projector", "finetune", "merge_lora", "evaluate", "promote"]
)
def test_a_killed_stage_finishes_with_the_same_result(project: Project, tmp_path: Path, stage: str) -> None:
    settings = inputs_of(stage, project)
    home, output = tmp_path / "home", tmp_path / "out"
    kills = run_with_kills(project, home, stage, output, *settings)
    assert kills >= 1
    made, reference = InputDirectory(output.as_uri()), reference_of(stage, settings)

    def content(directory: InputDirectory) -> dict[str, str]:
        # The report shows when it was made.
        return {entry.name: entry.sha256 for entry in directory.files() if not entry.name.endswith(".html")}

    if stage == "promote":
        from mlflow.tracking import MlflowClient

        versions = MlflowClient(f"sqlite:///{home}/mlflow.db").search_model_versions("name='killed'")
        assert [str(each.version) for each in versions] == ["1"]
        assert made.manifest.metrics == reference.manifest.metrics
    else:
        assert content(made) == content(reference)
    assert not [name for name in list_uris(output.as_uri()) if "/_" in name.removeprefix(output.as_uri())]
    assert not list((home / "work").glob("*"))
    assert leftovers(home) == []


@pytest.mark.usefixtures("project_s3")
def test_a_killed_deployment_leaves_no_server_behind(project: Project, tmp_path: Path) -> None:
    output = tmp_path / "out"
    command = [sys.executable, "-m", "shellv_core.cli", "deploy", "--preset", "smoke", f"output_uri={output.as_uri()}"]
    command += ["registered_model=shellv-smoke", f"data_uri={outputs('prepare_data')[0]}"]
    registry = f"sqlite:///{project.home}/mlflow.db"
    home = tmp_path / "home"
    variables = {**environment(project, home), "MLFLOW_TRACKING_URI": registry}
    process = subprocess.Popen(command, cwd=REPOSITORY, env=variables, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not any(" serve " in each for each in leftovers(home)) and time.monotonic() < deadline:
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    while leftovers(home) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert leftovers(home) == []
    with pytest.raises(ObjectNotFoundError):
        InputDirectory(output.as_uri())
    done = subprocess.run(
        command, cwd=REPOSITORY, env=variables, capture_output=True, text=True, timeout=200, check=False
    )
    assert done.returncode == 0, done.stderr
    assert InputDirectory(output.as_uri()).manifest.details["answer"]
