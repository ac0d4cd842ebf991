from __future__ import annotations

import pytest

from shellv_core.models.compose import load_model, save_model
from shellv_core.models.config import LoraConfig
from shellv_core.models.hacl import HaclHeads
from shellv_core.models.lora import add_lora
from shellv_core.training.config import HaclConfig, TrainingConfig
from shellv_core.training.engines.base import build_optimizer
from shellv_core.training.fit import TrainingData, fit
from shellv_core.training.loop import set_trainable
from shellv_core.training.model import TrainingModel, frozen_copy
from shellv_core.training.parts import describe_parts, part_of
from tests.training.tiny import CLIP, tiny_model, tiny_samples

CONFIG = TrainingConfig(
    trainable=("projector", "language_model"),
    projector_learning_rate=3e-4,
    language_model_learning_rate=2e-5,
    weight_decay=0.1,
    max_steps=1,
)
HACL = HaclConfig(weight=1.0, learning_rate=1e-3)


def rows(module, config=CONFIG):
    lines = [line.split() for line in describe_parts(module, config).replace(", ", "+").splitlines()]
    names = {"vision": "vision tower", "language": "language model"}
    found = {}
    for first, *rest in lines[1:]:
        found[names.get(first, first)] = tuple(rest[1:] if first in names else rest)
    return found


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    save_model(*tiny_model(CLIP), path)
    return path


def module_of(directory, lora=None):
    model, _ = load_model(directory, quantization=lora.quantization if lora else None)
    module = TrainingModel(model, HaclHeads(32), HACL)
    set_trainable(module, CONFIG)
    if lora:
        add_lora(model, lora)
    return module


def test_full_training(directory):
    module = module_of(directory)
    counts = dict.fromkeys(("vision tower", "projector", "language model", "heads"), 0)
    for name, parameter in module.named_parameters():
        counts[part_of(name)] += parameter.numel()
    tower, projector, language_model, heads = (f"{count:,}" for count in counts.values())
    assert rows(module) == {
        "vision tower": (tower, "0", "float32", "frozen"),
        "projector": (projector, projector, "float32", "0.0003"),
        "language model": (language_model, language_model, "float32", "2e-05"),
        "heads": (heads, heads, "float32", "0.001"),
    }
    assert projector == f"{2 * (32 * 32 + 32):,}"
    module.reference = frozen_copy(module.model)
    assert rows(module)["reference"][1:] == ("0", "float32", "frozen")


def test_only_the_projector(directory):
    module = module_of(directory)
    config = CONFIG.model_copy(update={"trainable": ("projector",)})
    set_trainable(module, config)
    assert rows(module, config)["language model"][1:] == ("0", "float32", "frozen")


@pytest.mark.parametrize("kind", [None, "nf4", "int8"])
def test_adapters_on_a_quantized_model_which_counts_as_before(directory, kind):
    total = rows(module_of(directory))["language model"][0]
    found = rows(module_of(directory, LoraConfig(r=4, quantization=kind)))
    shapes = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (64, 32)]
    adapters = f"{2 * sum(4 * (inputs + outputs) for inputs, outputs in shapes):,}"
    assert found["language model"][:2] == (total, "0")
    assert set(found["language model"][2].split("+")) == {"float32", *([kind] if kind else [])}
    assert found["adapters"][0] == found["adapters"][1] == adapters
    assert found["adapters"][2:] == ("float32", "2e-05")
    assert found["projector"] == ("2,112", "2,112", "float32", "0.0003")
    assert found["reference"] == ("2,112", "0", "float32", "frozen")


@pytest.mark.parametrize("kind", [None, "nf4"])
def test_rates_and_decay_of_adapters(directory, kind):
    module = module_of(directory, LoraConfig(r=4, dora=True, quantization=kind))
    groups = build_optimizer(module, CONFIG).param_groups
    found = {id(each): (group["base_lr"], group["weight_decay"]) for group in groups for each in group["params"]}
    seen = set()
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        part = part_of(name)
        rate = {"adapters": 2e-5, "projector": 3e-4, "heads": 1e-3}[part]
        vector = "lora_magnitude_vector" in name or name.endswith((".bias", "temperature"))
        assert found[id(parameter)] == (rate, 0.0 if vector else 0.1), name
        seen.add((part, vector))
    assert seen == {(part, vector) for part in ("adapters", "projector", "heads") for vector in (True, False)}


def test_fit_prints_the_table(tmp_path, caplog):
    model, processor = tiny_model()
    module = TrainingModel(model)
    set_trainable(module, CONFIG)
    with caplog.at_level("INFO"):
        fit(module, processor, TrainingData(lambda: tiny_samples(0), 1, "text"), CONFIG, 0, tmp_path, print, "test")
    assert describe_parts(module, CONFIG) in caplog.text
