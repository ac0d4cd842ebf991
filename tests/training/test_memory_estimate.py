"""The memory estimate: against measured runs, against its own parts, and what a run does with it."""

import copy
import json
import os
import subprocess
import sys

import pytest
import torch

from shellv_core.cli import main
from shellv_core.errors import ConfigError
from shellv_core.models.config import LoraConfig
from shellv_core.models.hacl import HaclHeads
from shellv_core.models.lora import add_lora
from shellv_core.training import memory, memory_pass
from shellv_core.training.config import HaclConfig, PreferenceConfig, TrainingConfig
from shellv_core.training.loop import set_trainable
from shellv_core.training.memory import DEVICES, check_memory, estimate_memory
from shellv_core.training.memory_batches import largest_batch
from shellv_core.training.model import TrainingModel
from tests.bench.memory import ALLOCATOR, CASES
from tests.e2e.conftest import REPOSITORY
from tests.training.tiny import CLIP, LANGUAGE_MODEL, tiny_model

BOTH = ("projector", "language_model")
MEASURED = """
import json, tempfile
from pathlib import Path
from tests.bench.memory import CASES, measure
with tempfile.TemporaryDirectory() as folder:
    print(json.dumps([[each.name, estimate, found] for each, estimate, found in measure(CASES, Path(folder))]))
"""


@pytest.mark.timeout(900)
def test_within_15_percent_of_measured_runs(tmp_path):
    environment = {**os.environ, **ALLOCATOR, "PYTHONPATH": str(REPOSITORY), "SHELLV_HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=880
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = json.loads(done.stdout.splitlines()[-1])
    assert [name for name, *_ in rows] == [each.name for each in CASES]
    for name, estimate, found in rows:
        assert found > 50e6, name
        assert estimate == pytest.approx(found, rel=0.15), name


@pytest.fixture(scope="module")
def models():
    """Models of two layers and of five, to be copied."""
    deep = LANGUAGE_MODEL.model_copy(update={"options": {**LANGUAGE_MODEL.options, "num_hidden_layers": 5}})
    return {2: tiny_model(CLIP, LANGUAGE_MODEL)[0], 5: tiny_model(CLIP, deep)[0]}


def module_of(models, layers=2, hacl=False, lora=False):
    heads = HaclHeads(32) if hacl else None
    module = TrainingModel(copy.deepcopy(models[layers]), heads, HaclConfig(weight=1.0) if hacl else None)
    set_trainable(module, config())
    if lora:
        add_lora(module.model, LoraConfig(r=2))
    return module


def config(**values):
    return TrainingConfig(**{"global_batch_size": 8, "max_length": 64, "trainable": BOTH, **values})


def estimated(module, settings, **options):
    return estimate_memory(module, settings, largest_batch(module, settings), "cpu", **options)


def test_layers_are_alike(models, monkeypatch):
    """What one layer and two tell of five is what five take."""
    module = module_of(models, 5)
    found = {}
    for settings in (config(), config(gradient_checkpointing=True), config(packing=True, pack_tokens=256)):
        few = estimated(module, settings)
        with monkeypatch.context() as patch:
            patch.setattr(memory_pass, "LAYERS_COUNTED", 5)
            whole = estimated(module, settings)
        assert few.total == pytest.approx(whole.total, rel=0.02)
        found[settings.gradient_checkpointing, settings.packing] = few
    assert found[True, False].layers < 0.5 * found[False, False].layers


def test_a_preference_counts_in_packs_too(models):
    """Its passes come on top; answers share their prompts in a pack, so there it takes less."""
    preferring = module_of(models, lora=True)
    preferring.preference = PreferenceConfig(weight=1.0)
    found = {}
    for packing in (False, True):
        settings = config(packing=packing, pack_tokens=512)
        found[packing] = estimated(preferring, settings)
        plain = estimated(module_of(models, lora=True), settings)
        assert plain.contrast == 0
        assert found[packing].total > 1.1 * plain.total
    assert 0 < found[True].contrast < found[False].contrast


def test_states_are_shared_as_zero_shares_them(models):
    module, settings = module_of(models), config()
    shared = sum(each.numel() for name, each in module.named_parameters() if "vision_tower" not in name) * 4
    whole = sum(each.numel() for each in module.model.model.vision_tower.parameters()) * 4
    whole += sum(each.numel() * each.element_size() for each in module.buffers())
    found = {}
    for stage in range(4):
        each = estimated(module, settings, num_devices=4, zero_stage=stage)
        found[stage] = (each.weights, each.gradients, each.optimizer, each.buffers)
    assert found == {
        0: (whole + shared, 2 * shared, 2 * shared, 0),
        1: (whole + shared, shared, 3 * shared / 4, shared),
        2: (whole + shared, shared / 4, 3 * shared / 4, shared),
        3: (whole + shared / 4, shared / 4, 3 * shared / 4, 2 * shared),
    }
    alone = estimated(module, settings)
    assert (alone.gradients, alone.optimizer) == (shared, 2 * shared)


def test_settings_that_save_memory_do(models):
    plain, adapted = module_of(models, hacl=True), module_of(models, hacl=True, lora=True)
    full = estimated(plain, config())
    assert full.contrast > 0
    assert estimated(plain, config(micro_batch_size=2)).layers < 0.5 * full.layers
    lora = estimated(adapted, config())
    assert lora.optimizer < 0.5 * full.optimizer
    quantized = estimated(adapted, config(precision="bf16"), quantization="nf4")
    assert quantized.weights < lora.weights
    assert estimated(plain, config(max_length=128)).logits > full.logits


def test_a_run_that_cannot_fit_is_refused(models, monkeypatch, caplog):
    module = module_of(models)
    need = estimated(module, config()).total
    monkeypatch.setattr(memory, "device_memory", lambda device: int(need / 1.1))
    with caplog.at_level("WARNING"):
        assert check_memory(module, config()).total == need
    assert "training needs about" in caplog.text
    monkeypatch.setattr(memory, "device_memory", lambda device: int(need / 2))
    with pytest.raises(ConfigError, match=r"training needs about .* Set training.check_memory=false"):
        check_memory(module, config())
    assert check_memory(module, config(check_memory=False)).total == need


def test_the_command(capsys):
    assert main(["estimate", "--device", "cpu"]) == 0
    said = capsys.readouterr().out
    assert "it fits" in said
    assert [line.split()[0] for line in said.splitlines()[:9]] == [
        "weights", "gradients", "optimizer", "buffers", "layers", "logits", "contrast", "vision", "overhead",
    ]  # fmt: skip
    assert main(["estimate", "--devices", "0"]) == 2


def test_what_does_not_fit_comes_with_what_does(capsys, monkeypatch):
    assert main(["estimate", "--device", "h200", "lora=null"]) == 0
    need = float(capsys.readouterr().out.split("This needs ")[1].split()[0]) * 1e9
    monkeypatch.setitem(DEVICES, "a100-40", 0.9 * need)
    assert main(["estimate", "--device", "a100-40", "lora=null"]) == 1
    assert "These settings fit:" in capsys.readouterr().out


def test_a_device_s_memory_is_known():
    found = memory.device_memory(torch.device("cpu"))
    assert 1e8 < found <= os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
