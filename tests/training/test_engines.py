"""Several processes against one: the same losses, metrics and weights, whatever a process has in its share."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from shellv_core.config import build_config
from shellv_core.errors import ConfigError
from shellv_core.training.batches import make_batch
from shellv_core.training.config import TrainingConfig
from shellv_core.training.engines.base import build_optimizer
from shellv_core.training.loop import learning_rate_factor, train
from tests.data.shard_folder import shard_folder
from tests.training import engine_runs
from tests.training.engine_runs import CASES, HACL, HALF, STEPS, Case, assert_about_same, assert_same
from tests.training.test_loop import config, module_of, parts  # noqa: F401
from tests.training.tiny import tiny_samples

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
    cases = {**CASES, "fault": FAULT, "preference": PREFERENCE, "cut": CUT, "half": HALF}
    return engine_runs.spawn(2, folder / "two", cases, folder / "home", (folder / "data").as_uri())


def alone(folder, case, name):
    return engine_runs.run(case, folder / "alone" / name, (folder / "data").as_uri())


def test_one_process_is_the_plain_loop(parts, tmp_path):  # noqa: F811
    """Bit for bit."""
    settings = config(max_steps=3)
    module, plain = module_of(parts, settings), module_of(parts, settings)
    seen = []

    def note(examples, rows, *arguments, **options):
        batch = make_batch(examples, rows, *arguments, **options)
        seen.append(batch)
        return batch

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("shellv_core.training.loop.make_batch", note)
        train(module, parts[2], parts[3], settings, 0, tmp_path, lambda metrics, step: None)
    optimizer = build_optimizer(plain, settings)
    for step, batch in enumerate(seen, start=1):
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * learning_rate_factor(step, 3, settings.warmup_ratio)
        optimizer.zero_grad()
        (plain.train()(batch).generation_loss_sum * (1 / len(batch.label_ids))).backward()
        learning = [each for group in optimizer.param_groups for each in group["params"]]
        torch.nn.utils.clip_grad_norm_(learning, settings.max_grad_norm)
        optimizer.step()
    assert len(seen) == 3
    for name, value in plain.state_dict().items():
        assert torch.equal(module.state_dict()[name], value), name


def test_a_model_stored_in_bfloat16(folder, found):
    expected = alone(folder, HALF, "half")
    assert {str(expected["state"][name].dtype) for name in expected["state"]} == {"torch.bfloat16", "torch.float32"}
    assert_about_same(found[0]["half"], expected)


@pytest.mark.parametrize("name", CASES)
def test_two_processes_learn_what_one_does(folder, found, name):
    expected = alone(folder, CASES[name], name)
    assert len(expected["metrics"]) == STEPS
    for each in found:
        assert_same(each[name], expected)
        assert each[name]["details"] == {"engine": "ddp", "num_processes": 2}
    assert expected["details"]["num_processes"] == 1
    if CASES[name].hacl == HACL:
        assert expected["metrics"][-1]["queue_fill"] > 0


def test_a_loss_by_each_ones_own_labels_is_noticed(folder, found):
    expected = alone(folder, dataclasses.replace(FAULT, fault=False), "no fault")
    with pytest.raises(AssertionError):
        assert_same(found[0]["fault"], expected)


def test_a_preference_where_one_process_has_no_pair(found):
    first, second = (each["preference"] for each in found)
    assert [each["loss"] for each in first["metrics"]] == [each["loss"] for each in second["metrics"]]
    assert all(torch.equal(first["state"][name], second["state"][name]) for name in first["state"])
    assert any("preference_loss" in each for each in first["metrics"])


def test_a_run_of_two_goes_on_as_one(folder, found):
    """Killed in its third step, when the second is saved."""
    assert len(found[0]["cut"]["metrics"]) == 3
    resumed = engine_runs.run(CASES["full"], folder / "two" / "cut")
    assert len(resumed["metrics"]) == STEPS - 2
    assert_same(resumed, alone(folder, CASES["full"], "uncut"))


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"engine": "deepspeed"}, "engine=deepspeed needs zero_stage"),
        ({"zero_stage": 2}, "zero_stage=2 has no effect with engine=ddp"),
    ],
)
def test_engine_and_stage_go_together(values, message):
    with pytest.raises(ConfigError, match=message):
        build_config(TrainingConfig, values)
