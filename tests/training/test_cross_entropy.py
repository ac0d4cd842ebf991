"""The chunked loss is the plain one, without the logits of all positions."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode

from shellv_core.training.cross_entropy import chunked_cross_entropy, log_probabilities

POSITIONS, HIDDEN, VOCABULARY = 23, 6, 41


def parts(bias=False, dtype=torch.float32, positions=POSITIONS):
    torch.manual_seed(0)
    head = nn.Linear(HIDDEN, VOCABULARY, bias=bias, dtype=dtype)
    hidden = torch.randn(positions, HIDDEN, dtype=dtype, requires_grad=True)
    return hidden, head, torch.randint(VOCABULARY, (positions,))


def both(hidden, head, labels, chunk, scale=0.37):
    results = []
    for chunked in (True, False):
        loss = (
            chunked_cross_entropy(hidden, head, labels, chunk)
            if chunked
            else functional.cross_entropy(head(hidden).float(), labels, reduction="sum")
        )
        inputs = [each for each in (hidden, *head.parameters()) if each.requires_grad]
        results.append((loss, torch.autograd.grad(loss * scale, inputs)))
    return results


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize("frozen", [False, True])
def test_loss_and_gradients_are_the_plain_ones(bias, chunk, frozen):
    hidden, head, labels = parts(bias)
    head.requires_grad_(not frozen)
    (loss, gradients), (expected, expected_gradients) = both(hidden, head, labels, chunk)
    torch.testing.assert_close(loss, expected, rtol=1e-6, atol=0)
    assert len(gradients) == (1 if frozen else 2 + bias)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_gradients_are_those_of_the_function():
    hidden, head, labels = parts(bias=True, dtype=torch.float64)

    def loss(hidden, weight, bias):
        # The parameters themselves, not copies.
        head.weight, head.bias = weight, bias
        return chunked_cross_entropy(hidden, head, labels, 5)

    inputs = (hidden, nn.Parameter(head.weight.data.clone()), nn.Parameter(head.bias.data.clone()))
    del head.weight, head.bias
    assert torch.autograd.gradcheck(loss, inputs)


def test_only_the_head_learns():
    hidden, head, labels = parts()
    hidden.requires_grad_(False)
    (loss, gradients), (expected, expected_gradients) = both(hidden, head, labels, 4)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(gradients, expected_gradients, rtol=1e-5, atol=1e-6)


def test_autocast_to_bfloat16_is_as_near_as_the_plain_way():
    hidden, head, labels = parts()
    with torch.autocast("cpu", torch.bfloat16):
        (loss, gradients), (expected, expected_gradients) = both(hidden, head, labels, 7)
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=0)
    for mine, theirs in zip(gradients, expected_gradients, strict=True):
        assert mine.dtype == torch.float32
        torch.testing.assert_close(mine, theirs, rtol=2e-2, atol=2e-2)


def test_without_labels_the_loss_is_zero_and_keeps_its_graph():
    hidden, head, labels = parts(positions=0)
    loss = chunked_cross_entropy(hidden, head, labels, 4)
    assert loss.item() == 0
    loss.backward()
    assert not head.weight.grad.any()


@pytest.mark.parametrize("chunk", [1, 7, 23, 100])
@pytest.mark.parametrize("autocast", [False, True])
def test_log_probabilities_are_the_plain_ones(chunk, autocast):
    hidden, head, labels = parts(bias=True)
    weights = torch.linspace(-1, 2, POSITIONS)
    results = []
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        for values in (
            log_probabilities(hidden, head, labels, chunk),
            -functional.cross_entropy(head(hidden).float(), labels, reduction="none"),
        ):
            results.append((values, torch.autograd.grad(values @ weights, [hidden, *head.parameters()])))
        with torch.no_grad():
            torch.testing.assert_close(log_probabilities(hidden, head, labels, chunk), results[0][0])
    limits = {"rtol": 2e-2, "atol": 2e-2} if autocast else {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(*results, **limits)
    assert results[0][0].shape == (POSITIONS,)


def test_log_probabilities_of_nothing_keep_their_graph():
    hidden, head, labels = parts(positions=0)
    values = log_probabilities(hidden, head, labels, 4)
    assert values.shape == (0,)
    values.sum().backward()
    assert not head.weight.grad.any()


@pytest.mark.parametrize(
    "function", [chunked_cross_entropy, lambda *arguments: log_probabilities(*arguments).sum()], ids=["sum", "each"]
)
def test_no_tensor_holds_the_logits_of_more_than_a_chunk(function):
    class Largest(TorchDispatchMode):
        rows = 0

        def __torch_dispatch__(self, function, types, arguments=(), options=None):
            result = function(*arguments, **(options or {}))
            if isinstance(result, torch.Tensor) and result.shape[-1:] == (VOCABULARY,):
                self.rows = max(self.rows, result.numel() // VOCABULARY)
            return result

    hidden, head, labels = parts()
    found = []
    for chunk in (4, POSITIONS):
        with Largest() as largest:
            function(hidden, head, labels, chunk).backward()
        found.append(largest.rows)
    # The transposed weight has HIDDEN rows.
    assert found == [HIDDEN, POSITIONS]
