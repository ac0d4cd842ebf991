"""ZeRO 1, 2 and 3 on two CPU processes against one plain one; cut, and gone on with in new processes, more or fewer."""

from __future__ import annotations

import dataclasses
import shutil
import types

import pytest

from shellv_core.errors import TrainingError
from shellv_core.models.hacl import HaclHeads
from shellv_core.training.config import TrainingConfig
from shellv_core.training.engines import deepspeed, make_engine
from shellv_core.training.loop import set_trainable
from shellv_core.training.model import TrainingModel
from tests.data.shard_folder import shard_folder
from tests.training import engine_runs
from tests.training.engine_runs import CASES, HALF, STEPS, Case, assert_about_same, assert_same
from tests.training.tiny import tiny_model, tiny_samples

STAGES = (1, 2, 3)
NAMES = ("full", "few images, adapters", "packed", "packed, preference")
#: With what saved a run begins, and on how many processes it goes on.
MOVES = {"two to two": ("two", 2), "two to one": ("two", 1), "one to two": ("one", 2)}


def with_stage(case: Case, stage: int, **values) -> Case:
    training = {**case.training, "engine": "deepspeed", "zero_stage": stage}
    return dataclasses.replace(case, training=training, **values)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("deepspeed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHELLV_HOME", str(path / "home"))
        patch.setenv("OMP_NUM_THREADS", "1")
        shard_folder((path / "data").as_uri(), path / "work", {"train": tiny_samples(24)}, samples_per_shard=8)
        yield path


def spawn(folder, world, name, cases):
    return engine_runs.spawn(world, folder / name, cases, folder / "home", (folder / "data").as_uri())


@pytest.fixture(scope="module")
def found(folder):
    """What each of two processes computed."""
    cases = {f"{name} {stage}": with_stage(CASES[name], stage) for name in NAMES for stage in STAGES}
    cases |= {f"cut {stage}": with_stage(CASES["full"], stage, stop=3) for stage in STAGES}
    cases |= {f"half {stage}": with_stage(HALF, stage) for stage in STAGES}
    return spawn(folder, 2, "two", cases)


@pytest.fixture(scope="module")
def expected(folder):
    """What one process without DeepSpeed computes."""
    return {name: engine_runs.run(CASES[name], folder / name, (folder / "data").as_uri()) for name in NAMES}


@pytest.fixture(scope="module")
def resumed(folder, found):
    """What new processes computed from what was saved, by move and stage; the first process's."""
    cuts = {f"cut {stage}": with_stage(CASES["full"], stage, stop=3) for stage in STAGES}
    whole = {name: dataclasses.replace(case, stop=None) for name, case in cuts.items()}
    spawn(folder, 1, "one", cuts)
    results = {}
    for move, (source, world) in MOVES.items():
        for name in cuts:
            shutil.copytree(folder / source / name, folder / move / name)
        results[move] = spawn(folder, world, move, whole)[0]
    return results


@pytest.fixture(scope="module")
def changed(folder, found):
    """What one engine computed from what the other saved."""
    name = "cut 3"
    shutil.copytree(folder / "two" / name, folder / "to plain")
    plain = engine_runs.run(CASES["full"], folder / "to plain")
    engine_runs.run(dataclasses.replace(CASES["full"], stop=3), folder / "from plain" / name)
    return plain, spawn(folder, 2, "from plain", {name: with_stage(CASES["full"], 3)})[0][name]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("stage", STAGES)
def test_two_processes_learn_what_one_does(found, expected, stage, name):
    run = found[0][f"{name} {stage}"]
    assert len(run["metrics"]) == STEPS
    assert_same(run, expected[name])
    assert run["details"] == {
        "engine": "deepspeed",
        "num_processes": 2,
        "zero_stage": stage,
        "zero_optimizer": "DeepSpeedZeroOptimizer_Stage3" if stage == 3 else "DeepSpeedZeroOptimizer",
    }
    assert found[1][f"{name} {stage}"]["metrics"][-1]["loss"] == run["metrics"][-1]["loss"]


@pytest.mark.parametrize("stage", STAGES)
def test_a_model_stored_in_bfloat16(folder, found, stage):
    run = found[0][f"half {stage}"]
    assert_about_same(run, engine_runs.run(HALF, folder / f"half {stage}", (folder / "data").as_uri()))


@pytest.mark.slow
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("stage", STAGES)
def test_a_cut_run_goes_on_in_new_processes(resumed, expected, stage, move):
    run = resumed[move][f"cut {stage}"]
    assert len(run["metrics"]) == STEPS - 2
    assert_same(run, expected["full"])


@pytest.mark.slow
def test_a_cut_run_goes_on_with_the_other_engine(changed, expected):
    for run in changed:
        assert len(run["metrics"]) == STEPS - 2
        assert_same(run, expected["full"])
    assert [run["details"]["engine"] for run in changed] == ["ddp", "deepspeed"]


def test_another_engine_than_was_asked_for_is_refused(monkeypatch):
    """As where a launcher falls back in silence."""
    other = types.SimpleNamespace(
        DeepSpeedEngine=type("DeepSpeedEngine", (), {}),
        initialize=lambda model, **others: (model, None, None, None),
    )
    monkeypatch.setattr(deepspeed, "_import_deepspeed", lambda: other)
    module = TrainingModel(tiny_model()[0], HaclHeads(32))
    settings = TrainingConfig(engine="deepspeed", zero_stage=2)
    set_trainable(module, settings)
    with pytest.raises(TrainingError, match="ZeRO-2 was asked for; what came is TrainingModel with stage None"):
        make_engine(module, settings)
    assert module.model.model.vision_tower in list(module.modules())
    assert module.heads.temperature.shape == ()
