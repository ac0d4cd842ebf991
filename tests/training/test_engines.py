"""Several processes against one: the same losses, metrics and weights, whatever a process has in its share."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from tests.data.shard_folder import shard_folder
from tests.training import engine_runs
from tests.training.engine_runs import CASES, HACL, STEPS, Case
from tests.training.tiny import tiny_samples

RATES = ("samples_per_second", "tokens_per_second", "peak_memory_gb", "data_wait_share", "mfu")
FAULT = Case(few_images=True, fault=True)
PREFERENCE = Case(hacl=None, lora=True, few_images=True, preference=0.5, micro=2)
CUT = dataclasses.replace(CASES["full"], stop=3)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("engines")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHELLV_HOME", str(path / "home"))
        patch.setenv("OMP_NUM_THREADS", "1")
        shard_folder((path / "data").as_uri(), path / "work", {"train": tiny_samples(24)}, samples_per_shard=8)
        yield path


@pytest.fixture(scope="module")
def found(folder):
    """What each of two processes computed."""
    cases = {**CASES, "fault": FAULT, "preference": PREFERENCE, "cut": CUT}
    return engine_runs.spawn(2, folder / "two", cases, folder / "home", (folder / "data").as_uri())


def alone(folder, case, name):
    return engine_runs.run(case, folder / "alone" / name, (folder / "data").as_uri())


def assert_same(run, expected, rtol=1e-4, atol=2e-5):
    assert len(expected["losses"]) == STEPS
    torch.testing.assert_close(run["losses"], expected["losses"], rtol=1e-5, atol=1e-5)
    assert run["last"].keys() == expected["last"].keys()
    for name, value in expected["last"].items():
        if name not in RATES and name != "useful_token_share":
            assert run["last"][name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    assert run["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(run["state"][name], value, rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_does(folder, found, name):
    expected = alone(folder, CASES[name], name)
    for each in found:
        assert_same(each[name], expected)
        assert each[name]["details"] == {"engine": "ddp", "num_processes": 2}
    assert expected["details"]["num_processes"] == 1
    assert expected["losses"][-1] < expected["losses"][0]
    if CASES[name].hacl == HACL:
        assert found[0][name]["last"]["queue_fill"] > 0
        assert any("queue" in key for key in expected["state"])


def test_a_loss_by_each_ones_own_labels_is_noticed(folder, found):
    expected = alone(folder, dataclasses.replace(FAULT, fault=False), "no fault")
    assert abs(found[0]["fault"]["losses"][0] - expected["losses"][0]) > 1e-3


def test_a_preference_where_one_process_has_no_pair(found):
    first, second = (each["preference"] for each in found)
    assert first["last"] == pytest.approx(second["last"], rel=0.5)
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert "preference_loss" in first["last"]


def test_a_run_of_two_goes_on_as_one(folder, found):
    """Killed after its third step, of which the second is saved."""
    assert len(found[0]["cut"]["losses"]) == 3
    resumed = engine_runs.run(CASES["full"], folder / "two" / "cut")
    assert len(resumed["losses"]) == STEPS - 2
    expected = alone(folder, CASES["full"], "uncut")
    torch.testing.assert_close(resumed["losses"], expected["losses"][2:], rtol=1e-5, atol=1e-5)
    for name, value in expected["state"].items():
        torch.testing.assert_close(resumed["state"][name], value, rtol=1e-4, atol=2e-5, msg=name)
