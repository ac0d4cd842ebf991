"""Runs that are killed, stopped or moved to another machine end with the weights of a run that nothing happened to."""

from __future__ import annotations

import json
import os
import random
import shutil
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shellv_core.storage import list_uris
from shellv_core.tracking.runs import open_client
from tests.data.shard_folder import shard_folder
from tests.reliability.resumable import EVERY, SAMPLES, STEPS, Kill, program, run, start, train
from tests.stages.training_data import write_data

NUM_KILLS = 10


@pytest.fixture(scope="module")
def environment(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    home = tmp_path_factory.mktemp("home")
    return {"SHELLV_HOME": str(home), "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def data_uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("data")
    return shard_folder((path / "data").as_uri(), path / "work", {"train": SAMPLES}, samples_per_shard=8).uri


@pytest.fixture(scope="module", params=[True, False], ids=["packed", "padded"])
def packing(request: pytest.FixtureRequest) -> bool:
    return bool(request.param)


@pytest.fixture(scope="module")
def whole(
    environment: dict[str, str], data_uri: str, packing: bool, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """The weights of an uninterrupted run, adapters, heads and queue included."""
    work = tmp_path_factory.mktemp("whole")
    assert run(train, environment, data_uri, packing, work) == 0
    return load_file(work / "final.safetensors")


def assert_same(work: Path, whole: dict[str, torch.Tensor]) -> None:
    final = load_file(work / "final.safetensors")
    assert final.keys() == whole.keys()
    different = [name for name, value in final.items() if not torch.equal(value, whole[name])]
    assert different == []


def newest(work: Path) -> int:
    pointer = work / "checkpoints" / "latest.json"
    return int(json.loads(pointer.read_bytes())["step"]) if pointer.exists() else 0


def test_ten_kills_change_no_bit(
    environment: dict[str, str], data_uri: str, packing: bool, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    chance = random.Random(packing)
    unfinished = 0
    for number, step in enumerate(sorted(chance.sample(range(2, STEPS - 3 * EVERY), NUM_KILLS))):
        kill = Kill(step, chance.uniform(0, 0.05), while_writing=number % 2 == 0)
        if kill.while_writing:
            kill = Kill(step, chance.uniform(0, 0.01), while_writing=True)
        assert run(train, environment, data_uri, packing, tmp_path, None, kill) == -9
        unfinished += any((tmp_path / "checkpoints").glob(".step-*"))
        assert newest(tmp_path) >= kill.step - 2 * EVERY, "checkpoints do not keep up"
    assert unfinished >= 1, "no kill fell into the writing of a checkpoint"
    assert newest(tmp_path) > 0
    assert run(train, environment, data_uri, packing, tmp_path) == 0
    assert int((tmp_path / "steps").read_text()) < STEPS, "it began from the start"
    assert_same(tmp_path, whole)
    kept = {path.name for path in (tmp_path / "checkpoints").glob("*step-*")}
    assert kept == {f"step-{STEPS}", f"step-{STEPS - EVERY}"}


def test_a_run_whose_machine_is_lost_goes_on_from_the_store(
    environment: dict[str, str],
    data_uri: str,
    packing: bool,
    whole: dict[str, torch.Tensor],
    bucket_uri: str,
    tmp_path: Path,
) -> None:
    s3 = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    address = f"{bucket_uri}/checkpoints/{'packed' if packing else 'padded'}"
    for kill in (Kill(20, 0.01), Kill(40, 0.0, while_writing=True)):
        work = tmp_path / f"machine-{kill.step}"
        assert run(train, environment | s3, data_uri, packing, work, address, kill) == -9
        assert newest(work) >= kill.step - 2 * EVERY
        shutil.rmtree(work)
    assert run(train, environment | s3, data_uri, packing, tmp_path / "last", address) == 0
    assert int((tmp_path / "last" / "steps").read_text()) <= STEPS - 40 + 3 * EVERY
    assert_same(tmp_path / "last", whole)
    names = {uri.removeprefix(f"{address}/").partition("/")[0] for uri in list_uris(address)}
    assert names == {"latest.json", f"step-{STEPS}", f"step-{STEPS - EVERY}"}


def test_sigterm_saves_and_asks_for_a_rerun(
    environment: dict[str, str], data_uri: str, packing: bool, whole: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    assert run(train, environment, data_uri, packing, tmp_path, None, None, 2 * EVERY + 1) == 143
    assert newest(tmp_path) == 2 * EVERY + 1
    assert run(train, environment, data_uri, packing, tmp_path) == 0
    assert int((tmp_path / "steps").read_text()) == STEPS - 2 * EVERY - 1
    assert_same(tmp_path, whole)


def test_a_stopped_stage_goes_on_with_the_same_command(
    environment: dict[str, str], bucket_uri: str, tracking_store: Path, tmp_path: Path
) -> None:
    """Through the program: its exit code and what it says, the tracked run, and what is left behind."""
    home, output = tmp_path / "project-folder", tmp_path / "out"
    s3 = {name: value for name, value in os.environ.items() if name.startswith("AWS_")}
    variables = environment | s3 | {"SHELLV_HOME": str(home)}
    write_data((tmp_path / "data").as_uri())
    checkpoints = f"{bucket_uri}/checkpoints"
    arguments = ["pretrain_projector", "--preset", "smoke", f"data_uri={(tmp_path / 'data').as_uri()}"]
    arguments += [
        f"output_uri={output.as_uri()}",
        "training.max_steps=60",
        "training.log_every_steps=1",
        "alignment=null",
    ]
    arguments += [f"training.checkpoint_uri={checkpoints}/{{fingerprint}}"]
    process = start(program, variables, arguments, tmp_path / "first")
    while process.is_alive() and not any((home / "work").glob("*/checkpoints/step-*")):
        time.sleep(0.01)
    process.terminate()
    process.join(timeout=120)
    said = (tmp_path / "first").read_text()
    assert process.exitcode == 143, said
    (line,) = [line for line in said.splitlines() if line.startswith("shellv:")]
    (work,) = (home / "work").iterdir()
    step = newest(work)
    assert line == f"shellv: stopped at step {step} by SIGTERM; run the same command again to go on"
    assert [path.name for path in output.iterdir()] == ["_in_progress.json"]
    assert any(uri.endswith(f"step-{step}/manifest.json") for uri in list_uris(checkpoints))
    shutil.rmtree(home / "work")
    assert run(program, variables, arguments, tmp_path / "second") == 0, (tmp_path / "second").read_text()
    assert f"going on from step {step} of 60" in (tmp_path / "second").read_text()
    assert (output / "manifest.json").exists()
    assert list_uris(checkpoints) == []
    assert not [*(home / "work").iterdir()]
    client = open_client()
    runs = client.search_runs([client.get_experiment_by_name("shellv").experiment_id])
    assert sorted(each.info.status for each in runs) == ["FINISHED", "KILLED"]
