"""Promotions at the same time, and promotions that are killed: real processes on one real MLflow database."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from promotions import make_evaluation, make_model

from shellv_core.tracking import lock
from shellv_core.tracking.championship import PREVIOUS_TAG, moves
from shellv_core.tracking.registry import CANDIDATE, CHAMPION, ModelRegistry, registered_models

pytestmark = pytest.mark.usefixtures("tracking_store")
NAME = "shellv-test"
PROMOTE = """
import os, signal, sys
from shellv_core.stages import promote
from shellv_core.tracking import lock
from shellv_core.tracking.registry import CHAMPION, ModelRegistry

model_uri, evaluation_uri, output_uri, thresholds_uri, die = sys.argv[1:]
lock.STALE_SECONDS = 1.0
move = ModelRegistry.set_alias

def set_alias(self, alias, version):
    if alias == CHAMPION and die == "before":
        os.kill(os.getpid(), signal.SIGKILL)
    move(self, alias, version)
    if alias == CHAMPION and die == "after":
        os.kill(os.getpid(), signal.SIGKILL)

ModelRegistry.set_alias = set_alias
print("ready", flush=True)
sys.stdin.readline()
result = promote.run(promote.PromoteConfig(
    model_uri=model_uri, evaluation_uri=evaluation_uri, output_uri=output_uri + "/{fingerprint}",
    registered_model="shellv-test", thresholds_uri=thresholds_uri,
))
print(result.model_dump_json())
"""


@pytest.fixture
def start(tmp_path):
    """Starts a process that promotes a model with so many right answers; it waits for a line before it begins."""
    root = (tmp_path / "store").as_uri()
    gate = tmp_path / "gate.yaml"
    gate.write_text("not_worse_than_champion: {pope_random_accuracy: 0.5}\n")
    processes = []

    def start(name, num_right, die="never"):
        model_uri = make_model(root, name)
        evaluation_uri = f"{root}/evaluations/{name}-{num_right}-data"
        if not (tmp_path / "store" / "evaluations" / f"{name}-{num_right}-data").exists():
            assert make_evaluation(root, model_uri, num_right) == evaluation_uri
        arguments = [model_uri, evaluation_uri, f"{root}/promotions", gate.as_uri(), die]
        process = subprocess.Popen(
            [sys.executable, "-c", PROMOTE, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        processes.append(process)
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        return process

    yield start
    for process in processes:
        process.kill()


def finish(process):
    output, errors = process.communicate("\n", timeout=280)
    assert process.returncode == 0, errors
    return json.loads(output)["details"]


def chain():
    """Versions from the champion back to the first."""
    registry, found = ModelRegistry(NAME), []
    version = registry.find(CHAMPION)
    while version is not None:
        found.append(version.version)
        previous = version.tags[PREVIOUS_TAG]
        version = registry.get(previous) if previous else None
    return found


def test_promotions_at_the_same_time_form_one_chain(start):
    processes = [start(name, 140 + number) for number, name in enumerate(("one", "two", "three"))]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    details = [finish(process) for process in processes]
    assert sorted(each["version"] for each in details) == ["1", "2", "3"]
    assert sorted(chain()) == ["1", "2", "3"], "each took over from another, and none was passed over"
    took_over = {each["version"]: each["compared_with_version"] for each in details}
    registry = ModelRegistry(NAME)
    assert {each.version: each.tags[PREVIOUS_TAG] or None for each in registry.versions()} == took_over
    assert [move.after for move in moves(registry)] == chain()[::-1]
    assert registered_models() == [NAME]


@pytest.mark.slow
def test_the_same_model_promoted_twice_at_the_same_time_is_one_version(start):
    processes = [start("one", 140) for _ in range(2)]
    for process in processes:
        process.stdin.write("\n")
        process.stdin.flush()
    ended = [process.communicate("\n", timeout=280) for process in processes]
    # They share an output folder: where one sees the other's unfinished files it may fail, and a rerun goes through.
    assert any(process.returncode == 0 for process in processes), ended
    assert [each.version for each in ModelRegistry(NAME).versions()] == ["1"]
    assert chain() == ["1"]
    finish(start("one", 140))


@pytest.mark.parametrize("die", ["before", pytest.param("after", marks=pytest.mark.slow)])
def test_a_killed_promotion_is_made_good_by_its_rerun(start, die):
    finish(start("one", 140))
    killed = start("two", 150, die)
    killed.communicate("\n", timeout=280)
    assert killed.returncode == -signal.SIGKILL
    assert ModelRegistry(NAME).find(CHAMPION).version == {"before": "1", "after": "2"}[die]
    details = finish(start("two", 150))
    assert (details["decision"], details["version"], details["compared_with_version"]) == ("promoted", "2", "1")
    assert chain() == ["2", "1"]
    assert {alias: ModelRegistry(NAME).find(alias).version for alias in (CANDIDATE, CHAMPION)} == {
        CANDIDATE: "2",
        CHAMPION: "2",
    }
    assert moves(ModelRegistry(NAME))[-1].after == "2"
    with lock.exclusive(NAME):
        pass
    assert registered_models() == [NAME]
    assert not list(Path(os.environ["SHELLV_HOME"]).glob("work/promote-*"))
