"""Counted operations against torch's own counter, which sees every matrix product that is run."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from shellv_core.models.compose import num_image_tokens, projector_layers
from shellv_core.models.config import LoraConfig
from shellv_core.models.hacl import HaclHeads
from shellv_core.models.lora import add_lora
from shellv_core.templates import template_of
from shellv_core.training.attention import documents_apart
from shellv_core.training.batches import make_batch
from shellv_core.training.config import HaclConfig, PreferenceConfig, TrainingConfig
from shellv_core.training.examples import tokenize_samples
from shellv_core.training.features import tower_features
from shellv_core.training.flops import PEAKS, FlopFormula, device_peak
from shellv_core.training.loop import set_trainable
from shellv_core.training.meter import Meter, peak_memory
from shellv_core.training.model import TrainingModel
from shellv_core.training.packed import make_row
from shellv_core.training.pairs import make_preference, make_readouts
from tests.bench.hacl_step import random_contrast
from tests.bench.models import EOS_TOKEN, IMAGE_TOKEN, random_pack
from tests.bench.packed_training import padded
from tests.training.packs import pack_of
from tests.training.tiny import CLIP, LANGUAGE_MODEL, tiny_model, tiny_samples

TEXTS, LABELLED = 40, 0.5


@pytest.fixture(scope="module")
def parts():
    model, processor = tiny_model(CLIP, LANGUAGE_MODEL)
    return model, processor


def module_of(parts, learns, heads=False):
    module = TrainingModel(
        copy.deepcopy(parts[0]), HaclHeads(32) if heads else None, HaclConfig(weight=1.0 if heads else 0.0)
    )
    both = ("projector", "language_model")
    set_trainable(module, TrainingConfig(trainable=("projector",) if learns == "projector" else both))
    if learns == "lora":
        add_lora(module.model, LoraConfig(r=4))
    module.model.set_attn_implementation("eager")
    return module.train()


def pack_and_features(module, texts=(TEXTS, TEXTS)):
    model = module.model
    count = num_image_tokens(model)
    pack = random_pack(texts, [True] * len(texts), count, model.config.text_config.vocab_size, LABELLED)
    ids = pack.input_ids.clone()
    ids[pack.input_ids == IMAGE_TOKEN] = model.config.image_token_id
    features = torch.randn(len(texts), count, model.config.vision_config.hidden_size)
    return pack, features


def counted(run):
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


def unseen(module, batch, learns):
    """The counter does not see addmm_, by which the chunked loss adds up the head's own gradient."""
    return FlopFormula(module, tower_runs=False).per_label / 3 * len(batch.label_ids) if learns == "all" else 0


def backward(module, batch):
    output = module(batch)
    loss = output.generation_loss_sum
    (loss if output.contrast is None else loss + output.contrast.objective(0.5)).backward()


@pytest.mark.parametrize("learns", ["all", "lora", "projector"])
def test_a_padded_step_without_padding(parts, learns):
    module = module_of(parts, learns)
    pack, features = pack_and_features(module)
    batch = padded(make_row(pack, features, IMAGE_TOKEN, EOS_TOKEN))
    flops = FlopFormula(module, tower_runs=False).of(batch)
    length = batch.input_ids.shape[1]
    # Plain attention computes what comes later too, and masks it.
    whole_square = flops.attention * 2 * length / (length + 1)
    expected = flops.total - flops.attention + whole_square
    seen = expected - unseen(module, batch, learns)
    assert counted(lambda: backward(module, batch)) == pytest.approx(seen, rel=0.01)
    assert flops.contrast == flops.preference == flops.vision_tower == 0
    with torch.no_grad():
        forward = counted(lambda: module(batch))
    low, high = {"all": (2.9, 3), "lora": (2.1, 2.5), "projector": (2, 2.3)}[learns]
    assert low <= expected / forward <= high


@pytest.mark.parametrize("learns", ["all", "lora"])
def test_a_packed_step_with_contrast(parts, learns):
    module = module_of(parts, learns, heads=True)
    pack, features = pack_and_features(module, (TEXTS, 25, 33))
    captions = [9, 12, 7]
    formula = FlopFormula(module, tower_runs=False)
    flops = {}
    for name, contrast in (("plain", None), ("contrast", random_contrast(captions, 300))):
        row = make_row(pack, features, IMAGE_TOKEN, EOS_TOKEN, contrast)
        flops[name] = formula.of(row)
        matrices = flops[name].total - formula.attention(row.documents.lengths) * 3
        readouts = [stop - start + 1 for start, stop in row.documents.spans]
        matrices -= 12 * formula.attention_size * sum(readouts)
        matrices -= unseen(module, row, learns)
        with documents_apart(module.model.model.language_model):
            seen = FlopCounterMode(display=False)
            with seen:
                backward(module, row)
        attention = sum(
            number for operation, number in seen.get_flop_counts()["Global"].items() if "attention" in str(operation)
        )
        assert seen.get_total_flops() - attention == pytest.approx(matrices, rel=0.01)
    assert flops["plain"].contrast == 0
    assert flops["contrast"].language_model == flops["plain"].language_model
    tokens = sum(captions) * 2 + 2 * 3 + 3
    share = flops["contrast"].contrast / flops["plain"].language_model
    assert share == pytest.approx(tokens / len(pack.input_ids), rel=0.1)


def test_the_tower_counts_where_it_runs(parts):
    module = module_of(parts, "projector")
    pack, features = pack_and_features(module)
    row = make_row(pack, features, IMAGE_TOKEN, EOS_TOKEN)
    size = module.model.config.vision_config.image_size
    pictures = torch.randn(2, 3, size, size)
    expected = counted(lambda: tower_features(module.model, pictures))
    assert FlopFormula(module, tower_runs=True).of(row).vision_tower == expected > 0


def test_padding_and_lies_that_are_not_there_do_not_count(parts):
    module = module_of(parts, "all", heads=True)
    pack, features = pack_and_features(module, (TEXTS, 10))
    contrast = random_contrast([9, 12], 300)
    formula = FlopFormula(module, tower_runs=False)
    packed, plain = (formula.of(each) for each in (
        make_row(pack, features, IMAGE_TOKEN, EOS_TOKEN), padded(make_row(pack, features, IMAGE_TOKEN, EOS_TOKEN))
    ))  # fmt: skip
    assert plain.language_model == packed.language_model
    assert plain.attention == pytest.approx(packed.attention, rel=0.25)
    batch = padded(make_row(pack, features, IMAGE_TOKEN, EOS_TOKEN))
    count = num_image_tokens(module.model)
    readouts = make_readouts(
        batch.input_ids.numpy(), batch.image_positions.view(2, count).numpy(), np.arange(2), np.arange(2), 0
    )
    whole = formula.of(replace(batch, contrast=contrast, readouts=readouts)).contrast
    contrast.hallucinated_valid[1] = False
    less = formula.of(replace(batch, contrast=contrast, readouts=readouts)).contrast
    assert whole - less == pytest.approx(14 * formula.per_token, rel=0.15)


def test_the_preference_counts_its_reference(parts):
    module = module_of(parts, "lora")
    module.preference = PreferenceConfig(weight=1.0)
    model, processor = module.model, parts[1]
    given = tiny_samples(2, False)
    examples = tokenize_samples(
        given, processor.tokenizer, model.config.image_token_id, num_image_tokens(model), 256,
        template=template_of(processor), prompt="Describe the image.",
    )  # fmt: skip
    features = torch.randn(2, num_image_tokens(model), model.config.vision_config.hidden_size)
    rows = np.flatnonzero(examples.image_index >= 0)
    ids = (model.config.image_token_id, model.generation_config.pad_token_id)
    padded_batch = make_batch(examples, rows, features, *ids, preference=True)
    preference = make_preference(examples, np.arange(2), *ids, turn=0)
    row = make_row(pack_of(given, examples), features, ids[0], EOS_TOKEN, preference=preference)

    def matrices(row):
        with FlopCounterMode(display=False) as counter, documents_apart(module.model.model.language_model):
            output = module(row)
            extra = 0 if output.preference is None else output.preference.objective(1.0, 1.0)
            (output.generation_loss_sum + extra).backward()
        counts = counter.get_flop_counts()["Global"]
        return sum(number for operation, number in counts.items() if "attention" not in str(operation))

    formula = FlopFormula(module, tower_runs=False)
    assert formula.of(replace(row, preference=None)).preference == 0
    found, documents = formula.of(row).preference, row.preference.documents
    assert formula.of(padded_batch).preference == found, "a prompt that is run again does not count again"
    seen = matrices(row) - matrices(replace(row, preference=None))
    whole = [stop - start + length for (start, stop), length in zip(documents.spans, documents.branches, strict=True)]
    prompts = [stop - start for start, stop in documents.spans]
    attention = formula.attention(documents.lengths) + formula.attention(whole) - formula.attention(prompts)
    # The projector runs once more for the reference.
    projector = 2 * sum(each.weight.numel() for each in projector_layers(model)) * features[..., 0].numel()
    assert found - 4 * attention + projector == pytest.approx(seen, rel=0.01)


def test_peaks_are_known_by_the_device_s_name(monkeypatch):
    names = {
        "NVIDIA A100-SXM4-80GB": 312e12,
        "NVIDIA H100 80GB HBM3": 989.5e12,
        "NVIDIA H100 PCIe": 756.5e12,
        "NVIDIA H200": 989.5e12,
        "Tesla T4": None,
    }
    for number, (name, peak) in enumerate(names.items()):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device, name=name: name)
        assert device_peak(torch.device("cuda", number)) == peak
    assert len(set(PEAKS)) == len(PEAKS)
    assert device_peak(torch.device("meta")) is None
    assert device_peak(torch.device("cpu")) is None


def test_rates_of_a_meter(parts, monkeypatch):
    module = module_of(parts, "all")
    pack, features = pack_and_features(module, (TEXTS, 10))
    batch = padded(make_row(pack, features, IMAGE_TOKEN, EOS_TOKEN))
    formula = FlopFormula(module, tower_runs=False)
    meter = Meter(torch.device("cpu"), formula, num_devices=2)
    meter.peak = formula.of(batch).total / 2
    meter.count(*meter.counts(batch))
    monkeypatch.setattr("shellv_core.training.meter.time", SimpleNamespace(monotonic=lambda: meter.start + 4.0))
    rates = meter.rates(seconds_waited=1.0)
    assert rates.pop("peak_memory_gb") == pytest.approx(peak_memory(torch.device("cpu")) / 1e9, rel=0.01)
    assert rates == {
        "samples_per_second": 0.5,
        "tokens_per_second": batch.num_tokens / 4,
        "useful_token_share": batch.num_tokens / batch.input_ids.numel(),
        "mfu": pytest.approx(0.25),
        "data_wait_share": 0.25,
    }
    assert {"mfu", "data_wait_share"}.isdisjoint(Meter(torch.device("cpu")).rates(None))
