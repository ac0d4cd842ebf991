"""Switches change how a run computes, not what; and they are off again afterwards."""

from __future__ import annotations

import contextlib
import os

import numpy as np
import pytest
import torch

from shellv_core.errors import TrainingError
from shellv_core.models.config import LoraConfig
from shellv_core.models.hacl import HaclHeads
from shellv_core.models.lora import add_lora
from shellv_core.training.batches import batch_images, make_batch
from shellv_core.training.config import HaclConfig, TrainingConfig
from shellv_core.training.examples import image_bytes, tokenize_samples
from shellv_core.training.features import pixel_batches, tower_features
from shellv_core.training.fit import TrainingData, fit
from shellv_core.training.loop import set_trainable
from shellv_core.training.model import TrainingModel
from shellv_core.training.runtime import CUBLAS_VARIABLE, runtime
from tests.training.test_packed import module_of, pack_of, packed, relative
from tests.training.tiny import CLIP, LANGUAGE_MODEL, tiny_model, tiny_samples

CHECKPOINTING = TrainingConfig(gradient_checkpointing=True)


@pytest.fixture(scope="module")
def built():
    return tiny_model(CLIP)


@pytest.fixture(scope="module")
def samples(built):
    """Examples and the image features of some rows."""
    model, processor = built
    examples = tokenize_samples(tiny_samples(), processor.tokenizer, processor.image_token_id, 4, 256)
    pictures = torch.cat(list(pixel_batches(image_bytes(tiny_samples()), processor)))
    return examples, tower_features(model, pictures)


def padded(module, samples):
    examples, features = samples
    rows = np.array([0, 3, 5])
    images = batch_images(examples, rows)
    batch = make_batch(examples, rows, features[images], module.model.config.image_token_id, 0, 2)
    output = module(batch)
    (output.generation_loss_sum + output.contrast.objective(0.5)).backward()
    found = {name: each.grad for name, each in module.named_parameters() if each.grad is not None}
    module.zero_grad(set_to_none=True)
    return output, found


@pytest.mark.parametrize("form", ["padded", "packed"])
@pytest.mark.parametrize("lora", [False, True])
def test_checkpointing_gives_the_same_gradients(built, samples, form, lora):
    """With HACL, and dropout in the adapters, which the second pass must draw again as it was."""
    module = module_of(built, lora).train()
    for each in module.modules():
        if isinstance(each, torch.nn.Dropout):
            each.p = 0.3
    row = pack_of(module, built[1])[3]
    calls = []
    module.model.model.language_model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))

    def gradients():
        torch.manual_seed(0)
        calls.clear()
        output, found = packed(module, row) if form == "packed" else padded(module, samples)
        return output.generation_loss_sum, found, len(calls)

    loss, expected, once = gradients()
    with runtime(module.model, CHECKPOINTING):
        again, mine, twice = gradients()
    assert torch.equal(again, loss)
    assert mine.keys() == expected.keys()
    assert any("text_projector" in name and grad.any() for name, grad in mine.items())
    assert all(torch.equal(mine[name], expected[name]) for name in expected)
    assert twice == 2 * once
    assert gradients()[2] == once


def test_checkpointing_of_a_model_that_cannot(built):
    module = module_of(built)
    module.model.model.language_model.layers = torch.nn.ModuleList()
    with (
        pytest.raises(TrainingError, match="no layers that transformers can checkpoint"),
        runtime(module.model, CHECKPOINTING),
    ):
        pass


def switches():
    return (
        torch.backends.cuda.matmul.allow_tf32,
        torch.backends.cudnn.allow_tf32,
        torch.are_deterministic_algorithms_enabled(),
        torch.backends.cudnn.benchmark,
        os.environ.get(CUBLAS_VARIABLE),
    )


@pytest.mark.parametrize("workspace", [None, ":16:8"])
def test_switches_are_set_and_set_back(built, monkeypatch, workspace):
    monkeypatch.delenv(CUBLAS_VARIABLE, raising=False)
    if workspace:
        monkeypatch.setenv(CUBLAS_VARIABLE, workspace)
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", True)
    before = switches()
    with runtime(built[0], TrainingConfig()):
        assert switches() == (False, False, *before[2:])
    with contextlib.suppress(KeyError), runtime(built[0], TrainingConfig(tf32=True, deterministic=True)):
        assert switches() == (True, True, True, False, workspace or ":4096:8")
        raise KeyError
    assert switches() == before


def test_fit_trains_within_them_and_ends_with_the_same_bits(tmp_path):
    config = TrainingConfig(
        global_batch_size=4,
        max_steps=3,
        trainable=("projector", "language_model"),
        language_model_learning_rate=1e-2,
        log_every_steps=1,
        gradient_checkpointing=True,
        deterministic=True,
    )

    def run(directory):
        model, processor = tiny_model()
        torch.manual_seed(0)
        module = TrainingModel(model, HaclHeads(32), HaclConfig(weight=0.5))
        set_trainable(module, config)
        add_lora(model, LoraConfig(r=4, dropout=0.2))
        seen = []

        def log(metrics, step):
            seen.append((torch.are_deterministic_algorithms_enabled(), model.model.language_model.training))

        fit(module, processor, TrainingData(tiny_samples, 9, "tiny"), config, 0, directory, log, "test")
        assert seen == [(True, True)] * 3
        assert not torch.are_deterministic_algorithms_enabled()
        return module.state_dict()

    first, again = run(tmp_path / "first"), run(tmp_path / "again")
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_compiled_layers_give_the_same_gradients_for_any_pack(samples):
    """One layer and packs of several forms, of which each after the second must find its code compiled already."""
    one = LANGUAGE_MODEL.model_copy(update={"options": {**LANGUAGE_MODEL.options, "num_hidden_layers": 1}})
    built = tiny_model(CLIP, one)
    module = module_of(built, hacl=False).train()
    forms = [
        ((9, True), (5, False), (16, True)),
        ((8, True), (11, True)),
        ((6, True), (9, False), (11, True), (7, False)),
    ]
    rows = [pack_of(module, built[1], lengths=lengths)[3] for lengths in forms]
    expected = [packed(module, row)[1] for row in rows]
    frames = []
    with runtime(module.model, TrainingConfig(compile=True)):
        for row, gradients in zip(rows, expected, strict=True):
            mine = packed(module, row)[1]
            assert max(relative(mine[name], gradients[name]) for name in gradients if gradients[name].any()) < 1e-4
            frames.append(torch._dynamo.utils.counters["frames"]["ok"])
    assert frames[0] > 0
    assert frames[1] == frames[2]
    after = packed(module, rows[0])[1]
    assert all(torch.equal(after[name], expected[0][name]) for name in after)
