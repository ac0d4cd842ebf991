"""The guard: what it lets pass, what it stops, and what it says then."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from shellv_core.errors import TrainingError
from shellv_core.training.checkpoints import Checkpoints
from shellv_core.training.config import TrainingConfig
from shellv_core.training.divergence import DivergenceGuard

VOCAB_SIZE = 1000


@pytest.fixture
def checkpoints(tmp_path):
    with Checkpoints(tmp_path, None, "me") as checkpoints:
        yield checkpoints


def steps_until_stopped(checkpoints, losses, **settings):
    guard = DivergenceGuard(TrainingConfig(**settings), VOCAB_SIZE, checkpoints)
    for step, loss in enumerate(losses, start=1):
        try:
            guard.check(step, {"loss": loss, "gradient_norm": 1.0, "generation_loss": loss})
        except TrainingError:
            return step
    return None


@pytest.mark.parametrize(
    "losses",
    [
        pytest.param([7 * 0.99**step for step in range(500)], id="learning"),
        pytest.param([1.0] * 50 + [90.0] * 9 + [1.0] * 50, id="a spike of nine steps"),
        pytest.param([1.0, 90.0] * 50, id="every second step"),
        pytest.param([0.01] * 50 + [2.9] * 50, id="learned by heart, then something new"),
        pytest.param([0.3] + [3.5] * 100, id="an easy first step"),
        pytest.param([12.0] * 30, id="worse than guessing at the start"),
    ],
)
def test_usual_runs_pass(checkpoints, losses):
    assert steps_until_stopped(checkpoints, losses) is None


@pytest.mark.parametrize(
    ("losses", "stopped"),
    [
        pytest.param([2.0] * 50 + [6.1] * 50, 60, id="three times the median"),
        pytest.param([0.1] * 50 + [3.1] * 50, 60, id="three nats more"),
        pytest.param([80.0] * 50, 10, id="from the start"),
        pytest.param([9.0 * 1.2**step for step in range(50)], 15, id="growing from the start"),
        pytest.param([2.0] * 50 + [math.nan], 51, id="not finite"),
    ],
)
def test_exploding_losses_are_stopped(checkpoints, losses, stopped):
    assert steps_until_stopped(checkpoints, losses) == stopped


def test_it_can_be_tuned_and_switched_off(checkpoints):
    losses = [2.0] * 50 + [60.0] * 50
    assert steps_until_stopped(checkpoints, losses, divergence_steps=3) == 53
    assert steps_until_stopped(checkpoints, losses, divergence_factor=31) is None
    assert steps_until_stopped(checkpoints, losses, divergence_factor=None) is None
    assert steps_until_stopped(checkpoints, [2.0, math.inf], divergence_factor=None) == 2


def test_it_remembers_across_processes(checkpoints):
    first = DivergenceGuard(TrainingConfig(), VOCAB_SIZE, checkpoints)
    for step in range(1, 151):
        first.check(step, {"loss": 0.5, "gradient_norm": 1.0, "generation_loss": 0.5})
    assert len(first.recent) == 100
    second = DivergenceGuard(TrainingConfig(), VOCAB_SIZE, checkpoints, first.recent)
    assert not second.suspicious
    second.check(151, {"loss": 3.1, "gradient_norm": 1.0, "generation_loss": 3.1})
    assert second.suspicious
    second.check(152, {"loss": 0.5, "gradient_norm": 1.0, "generation_loss": 0.5})
    assert not second.suspicious


def test_the_message_says_what_where_and_what_to_do(checkpoints, tmp_path):
    guard = DivergenceGuard(TrainingConfig(divergence_steps=1), VOCAB_SIZE, checkpoints)
    high = {"loss": 90.0, "gradient_norm": 1.0, "generation_loss": 80.0}
    with pytest.raises(TrainingError, match=r"is 80 at step 7 .* Lower the learning rates .* no checkpoint yet"):
        guard.check(7, high)
    checkpoints.save(5, {"weights.a": torch.ones(1)}, {})
    for metrics in (high, {**high, "gradient_norm": math.inf}):
        with pytest.raises(TrainingError, match=rf"last good checkpoint is that of step 5, {tmp_path}/step-5\."):
            guard.check(7, metrics)


def test_weights_that_are_not_finite_are_never_saved(checkpoints):
    guard = DivergenceGuard(TrainingConfig(), VOCAB_SIZE, checkpoints)
    for value, part in itertools.product((math.nan, math.inf), ("weights.a", "queue.a")):
        state = {"weights.b": torch.ones(2), part: torch.tensor([0.0, value])}
        if part == "queue.a":
            guard.check_state(3, state)
            continue
        with pytest.raises(TrainingError, match="a is not finite after step 3; lower the learning rates"):
            guard.check_state(3, state)
