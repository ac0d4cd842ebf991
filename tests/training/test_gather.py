"""Two gloo processes with gather against one with the joined batch: losses, metrics, gradients, queue."""

from __future__ import annotations

import pytest
import torch

from tests.training import ranks


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("OMP_NUM_THREADS", "1")
        torch.multiprocessing.spawn(ranks.work, (str(folder),), nprocs=ranks.WORLD)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(ranks.WORLD)]


def mean(values):
    return sum(values) / len(values)


@pytest.mark.parametrize("mode", ["paired", "batch"])
@pytest.mark.parametrize("split", ranks.SPLITS)
def test_processes_equal_one_with_the_joined_batch(found, split, mode):
    parts = [each["gathered"][split, mode] for each in found]
    expected = ranks.joined(split, mode)
    for name in ("loss", "metrics", "temperature"):
        torch.testing.assert_close(mean([each[name] for each in parts]), expected[name], msg=name)
    for name in ranks.LEAVES:
        for ((first, last), slots), each in zip(ranks.SPLITS[split], parts, strict=True):
            whole = expected[f"gradient.{name}"][first:last]
            if name in ("hallucinated", "truth"):
                whole = whole[:, :slots]
            assert whole.abs().max() > 1e-3 if whole.numel() else True
            # Data parallel training takes the mean over processes of what their losses' sum gives.
            torch.testing.assert_close(each[f"gradient.{name}"] / ranks.WORLD, whole, msg=name)


def test_targets_without_the_offset_are_noticed(found):
    expected = ranks.joined("ragged", "batch")
    loss = mean([each["fault"]["loss"] for each in found])
    assert abs(loss - expected["loss"]) > 0.05


def test_a_process_that_learns_nothing_does_not_stop_the_others(found):
    expected = ranks.joined("ragged", "batch")
    first, second = (each["some"] for each in found)
    assert second == {}
    torch.testing.assert_close(first["image"] / ranks.WORLD, expected["gradient.image"][:4])


def test_nothing_anywhere(found):
    assert [each["nothing"] for each in found] == [0, 0]


def test_a_models_step_is_that_of_one_process(found):
    """Through the language model, under DDP, with texts of other lengths in each process."""
    expected = ranks.training_step(sum(ranks.CONVERSATIONS, ()))
    for each in found:
        assert each["step"].keys() == expected.keys()
        for name, value in expected.items():
            torch.testing.assert_close(each["step"][name], value, rtol=1e-4, atol=1e-6, msg=name)
    assert expected["queue.texts.count"] == 12
    assert sum(value.abs().sum() > 0 for name, value in expected.items() if "queue" not in name) > 20
