"""Quantized base models: what is quantized, what is not, and that a layer survives a pass without gradients."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from torch import nn

from shellv_core.config import build_config
from shellv_core.errors import ConfigError
from shellv_core.models.compose import load_model, save_model
from shellv_core.models.config import LoraConfig
from shellv_core.models.lora import add_lora, without_adapters
from tests.models.test_lora import batch
from tests.training.tiny import CLIP, LANGUAGE_MODEL, tiny_model

TIED = LANGUAGE_MODEL.model_copy(update={"tie_word_embeddings": True})
QUANTIZED = {"nf4": torch.uint8, "int8": torch.int8}


@pytest.fixture(scope="module", params=[LANGUAGE_MODEL, TIED], ids=["untied", "tied"])
def directory(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    save_model(*tiny_model(CLIP, request.param), path)
    return path


@pytest.mark.parametrize("kind", QUANTIZED)
def test_linear_layers_of_the_language_model_are_quantized_and_nothing_else(directory, kind):
    plain, quantized = load_model(directory)[0], load_model(directory, quantization=kind)[0]
    kept = {name: value for name, value in plain.named_parameters() if name in dict(quantized.named_parameters())}
    assert kept.keys() == dict(plain.named_parameters()).keys()
    for name, parameter in quantized.named_parameters():
        module = quantized.get_submodule(name.rpartition(".")[0])
        if ".language_model." in name and isinstance(module, nn.Linear) and name.endswith(".weight"):
            assert parameter.dtype == QUANTIZED[kind]
            assert not parameter.requires_grad
        else:
            assert torch.equal(parameter, kept[name])
    # Not in eval mode, in which some CPUs pack 4-bit weights, and only those of sizes larger than these.
    with torch.no_grad():
        mine, expected = (model.train()(**batch(model)).logits.flatten() for model in (quantized, plain))
    assert {"nf4": 0.85, "int8": 0.999}[kind] < torch.cosine_similarity(mine, expected, dim=0) < 0.99999


@pytest.mark.parametrize("kind", QUANTIZED)
def test_the_same_bits_every_time(directory, kind):
    first, again = (load_model(directory, quantization=kind)[0].state_dict() for _ in range(2))
    assert first.keys() == again.keys()
    assert all(torch.equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize("kind", QUANTIZED)
def test_a_pass_without_gradients_leaves_the_gradients_as_they_were(directory, kind):
    """Some CPUs pack 4-bit weights in such a pass, and then they pass no gradients on."""
    model, _ = load_model(directory, quantization=kind)
    adapted = add_lora(model, LoraConfig(r=4, quantization=kind))

    def gradients():
        model.train()
        model.zero_grad()
        model(**batch(model)).logits.square().mean().backward()
        return {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}

    before = gradients()
    model.eval()
    with torch.no_grad(), without_adapters(adapted):
        model(**batch(model))
    after = gradients()
    assert any("layers.0" in name and grad.any() for name, grad in before.items())
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_missing_bitsandbytes_is_named(directory, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="needs the package bitsandbytes, which is not installed here"):
        load_model(directory, quantization="nf4")


def test_int8_takes_no_dora():
    with pytest.raises(ConfigError, match="does not go together with quantization=int8"):
        build_config(LoraConfig, {"dora": True, "quantization": "int8"})
