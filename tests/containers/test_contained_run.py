"""The whole pipeline in containers, undisturbed and with its training containers killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from shellv_core.errors import StorageError
from shellv_core.storage import InputDirectory, list_uris
from shellv_core.storage.seaweedfs import EmbeddedS3, embedded_s3
from tests.e2e.conftest import REPOSITORY

pytestmark = [pytest.mark.containers, pytest.mark.timeout(3600)]

# More steps than the preset's, so that there is time to kill between a checkpoint and the end.
SETTINGS = [
    f"{stage}.training.{setting}"
    for stage in ("pretrain_projector", "finetune")
    for setting in ("max_steps=60", "checkpoint_every_steps=5")
]
COMMAND = [sys.executable, "-m", "pipelines", "run-containers", "--preset", "smoke", *SETTINGS]
TRAINED = ("pretrain_projector", "finetune", "merge_lora")
STATELESS = ("AWS_", "MLFLOW_", "SHELLV_")


def environment(home: Path) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(STATELESS)}
    return {**kept, "SHELLV_HOME": str(home), "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The project folder of a run that nothing disturbed, and what it showed."""
    home = tmp_path_factory.mktemp("undisturbed")
    done = subprocess.run(
        COMMAND, cwd=REPOSITORY, env=environment(home), capture_output=True, text=True, timeout=1800, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return home / "containers", done.stdout


def contents(home: Path) -> Mapping[str, dict[str, str]]:
    """The hashes of what training made, by stage and fingerprint; reports show when they were made."""
    with embedded_s3(home / "s3"):
        found = {}
        for stage in TRAINED:
            uris = {uri.split("/")[4] for uri in list_uris(f"s3://shellv/{stage}/")}
            for fingerprint in sorted(uris):
                files = InputDirectory(f"s3://shellv/{stage}/{fingerprint}").files()
                found[f"{stage}/{fingerprint}"] = {
                    each.name: each.sha256 for each in files if not each.name.endswith(".html")
                }
        return found


def test_the_run_ends_with_a_promoted_model_and_an_answer_from_the_serving_container(
    undisturbed: tuple[Path, str],
) -> None:
    home, shown = undisturbed
    assert "verdict    promoted" in shown
    assert "served     models:/shellv-smoke@champion version 1" in shown
    assert "answer     " in shown
    assert (home / "report.html").stat().st_size > 10_000


def kill_training(engine: Any, home: Path, run: subprocess.Popen[str], stage: str) -> None:
    """Wait until `stage` has put a checkpoint into the object store, then kill its container's processes."""
    deadline = time.monotonic() + 1500
    s3 = EmbeddedS3(home / "s3")
    while time.monotonic() < deadline and run.poll() is None:
        time.sleep(0.2)
        if not (s3.folder / "server.json").exists():
            continue
        try:
            os.environ.update(s3.environment())
            held = [uri for uri in list_uris(f"s3://shellv/{stage}/") if ".checkpoints-" in uri]
        except StorageError:
            continue
        key = f"AWS_ACCESS_KEY_ID={os.environ['AWS_ACCESS_KEY_ID']}"
        for container in engine.containers.list() if held else []:
            config = container.attrs["Config"]
            if key in config["Env"] and config["Cmd"][-1] == stage:
                os.kill(container.attrs["State"]["Pid"], signal.SIGKILL)
                return
    raise AssertionError(f"{stage} has left no checkpoint; the run {'goes on' if run.poll() is None else 'is over'}")


@pytest.fixture
def clean_environment() -> Iterator[None]:
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


@pytest.mark.usefixtures("clean_environment")
def test_killed_training_containers_are_retried_and_leave_the_same_model(
    undisturbed: tuple[Path, str], engine: Any, tmp_path: Path
) -> None:
    log = tmp_path / "output.txt"
    with log.open("w") as output:
        run = subprocess.Popen(
            COMMAND, cwd=REPOSITORY, env=environment(tmp_path), stdout=output, stderr=subprocess.STDOUT, text=True
        )
        try:
            for stage in ("pretrain_projector", "finetune"):
                kill_training(engine, tmp_path / "containers", run, stage)
            assert run.wait(1500) == 0, log.read_text()
        finally:
            if run.poll() is None:
                run.send_signal(signal.SIGINT)
                run.wait(120)
    shown = log.read_text()
    assert shown.count("failed after") == 2
    assert shown.count(", once more") == 2
    assert "going on from step" in (tmp_path / "containers" / "logs" / "run.log").read_text()
    assert contents(tmp_path / "containers") == contents(undisturbed[0])
