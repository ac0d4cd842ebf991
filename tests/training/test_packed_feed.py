"""Training from packs: what a run holds, and that a cut one ends like one that was not."""

from __future__ import annotations

import dataclasses
import itertools

import numpy as np
import pytest
import torch

from shellv_core.errors import ConfigError, TrainingError
from shellv_core.models.config import LoraConfig
from shellv_core.models.hacl import HaclHeads
from shellv_core.models.lora import add_lora
from shellv_core.stages import finetune, merge_lora, pretrain_projector
from shellv_core.storage import InputDirectory
from shellv_core.training.batches import count_label_tokens
from shellv_core.training.config import AlignmentConfig, HaclConfig, PreferenceConfig, TrainingConfig
from shellv_core.training.examples import tokenize_samples
from shellv_core.training.fit import TrainingData, fit
from shellv_core.training.loop import set_trainable, train_from
from shellv_core.training.model import TrainingModel, frozen_copy
from shellv_core.training.packed_feed import pack_sizes, packed_feed
from tests.data.shard_folder import shard_folder
from tests.stages.training_data import MODEL
from tests.training.tiny import CLIP, tiny_model, tiny_samples

SAMPLES = tiny_samples(24)
BOTH = ("projector", "language_model")


def config(**values):
    defaults = {
        "global_batch_size": 6,
        "max_steps": 5,
        "trainable": BOTH,
        "projector_learning_rate": 1e-2,
        "language_model_learning_rate": 1e-2,
        "log_every_steps": 1,
        "checkpoint_every_steps": 1,
        "max_length": 256,
        "packing": True,
        "pack_tokens": 256,
    }
    return TrainingConfig(**{**defaults, **values})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("shards")
    return shard_folder((path / "data").as_uri(), path / "work", {"train": SAMPLES}, samples_per_shard=8)


@pytest.fixture
def data(folder, project_folder):
    return TrainingData.of(InputDirectory(folder.uri), "train")


def fresh(settings, hacl=True, lora=True, queue=0):
    model, processor = tiny_model(CLIP, samples=SAMPLES)
    torch.manual_seed(0)
    module = TrainingModel(model, HaclHeads(32) if hacl else None, HaclConfig(weight=0.5, queue_size=queue))
    set_trainable(module, settings)
    if lora:
        add_lora(model, LoraConfig(r=2, dropout=0.2))
    return module, processor


def run(data, directory, settings, log=lambda metrics, step: None, **options):
    module, processor = fresh(settings, **options)
    summary = fit(module, processor, data, settings, 0, directory, log, "test")
    return {name: value.clone() for name, value in module.state_dict().items()}, summary


def test_an_epoch_of_packs_learns_every_label_once(data):
    settings = config(max_steps=None, epochs=1.0, pack_tokens=128, max_length=128)
    module, processor = fresh(settings, lora=False)
    examples = tokenize_samples(SAMPLES, processor.tokenizer, processor.image_token_id, 4, 256)
    with packed_feed(module, processor, data.source, "train", settings, 0) as feed:
        steps = [(list(step.parts), step.num_labels) for step in feed.steps(0, None)]
        assert len(steps) == feed.total
    rows = [part.batch for parts, _ in steps for part in parts]
    assert sum(labels for _, labels in steps) == count_label_tokens(examples, np.arange(len(examples)))
    assert sum(len(row.label_ids) for row in rows) == sum(labels for _, labels in steps)
    assert sum(row.num_samples for row in rows) == len(examples)
    assert len(rows) > len(steps), "steps have several packs"
    for parts, _ in steps:
        assert sum(part.share for part in parts) == pytest.approx(1)
    # Conversations per step are about as many as asked for.
    assert len(examples) / len(steps) == pytest.approx(6, rel=0.25)
    assert max(row.num_tokens for row in rows) <= rows[0].num_slots == feed.loader.max_length <= 128


@pytest.mark.parametrize("stop", [1, 3])
def test_interrupted_run_ends_like_an_uninterrupted_one(data, tmp_path, stop):
    """In the middle of an epoch and beyond its end, with adapters, dropout, the contrastive objective and its queue."""
    settings = config(max_steps=4, global_batch_size=18, pack_tokens=400)

    class Killed(Exception):
        pass

    def killer(metrics, step):
        if step > stop:
            raise Killed

    expected, _ = run(data, tmp_path / "whole", settings, queue=32)
    with pytest.raises(Killed):
        run(data, tmp_path / "cut", settings, killer, queue=32)
    resumed, _ = run(data, tmp_path / "cut", settings, queue=32)
    assert expected["queue.texts.count"] == 32
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    module, processor = fresh(settings)
    with packed_feed(module, processor, data.source, "train", settings, 0) as feed:
        assert 1 < feed.loader.num_steps(0) < 4, "an epoch ends within the run"


def test_position_is_in_the_checkpoint_and_another_plan_is_refused(data, tmp_path):
    settings = config(max_steps=2)
    run(data, tmp_path, settings)
    with pytest.raises(TrainingError, match="other data or settings"):
        run(data, tmp_path, config(max_steps=2, pack_tokens=300))
    module, processor = fresh(settings)
    with packed_feed(module, processor, data.source, "train", settings, 0) as feed:
        again = train_from(feed, module, settings, 0, tmp_path / "checkpoint", lambda metrics, step: None)
        assert again.num_steps == 2
        assert feed.loader.step == 2, "a finished run goes to where it stands and reads nothing"
        list(itertools.islice(feed.steps(1, {**feed.position(), "step": 1}), 1))
        assert feed.loader.step == 2
        with pytest.raises(ConfigError, match="another plan"):
            next(feed.steps(1, {**feed.position(), "plan_hash": "0" * 64}))


@pytest.mark.parametrize(("precision", "lora", "share"), [("fp32", False, 0.6), ("bf16", True, 0.8)])
def test_learns_and_reports(data, tmp_path, precision, lora, share):
    logged = {}
    settings = config(max_steps=40, precision=precision, log_every_steps=10)
    _, summary = run(data, tmp_path, settings, lambda metrics, step: logged.update({step: metrics}), lora=lora)
    assert logged[40]["generation_loss"] < share * logged[10]["generation_loss"]
    assert logged[40]["image_to_text_loss"] < logged[10]["image_to_text_loss"]
    assert {"samples_per_second", "tokens_per_second", "useful_token_share", "data_wait_share"} <= set(summary.metrics)
    assert 0.7 < summary.metrics["useful_token_share"] <= 1
    assert 0 <= summary.metrics["data_wait_share"] < 1


def test_same_loss_as_padded_training(data, tmp_path):
    """One step over all conversations, before any weight has moved: in one pack, in many, and padded."""
    found = []
    for number, changes in enumerate(({"packing": False}, {"pack_tokens": 8192}, {"pack_tokens": 128})):
        settings = config(max_steps=1, global_batch_size=60, max_length=128, **changes)
        _, summary = run(data, tmp_path / str(number), settings, hacl=False, lora=False)
        found.append(summary.metrics)
    padded, one, many = found
    assert one["useful_token_share"] != many["useful_token_share"]
    assert many["generation_loss"] == pytest.approx(one["generation_loss"], rel=1e-5)
    assert many["gradient_norm"] == pytest.approx(one["gradient_norm"], rel=1e-4)
    # Pictures come through another decoder, so features differ a little.
    assert one["generation_loss"] == pytest.approx(padded["generation_loss"], rel=1e-3)
    assert one["gradient_norm"] == pytest.approx(padded["gradient_norm"], rel=2e-2)


def test_sizes_keep_the_asked_for_conversations():
    lengths = np.full(1000, 700)
    assert pack_sizes(lengths, config(max_length=2048, pack_tokens=8192, global_batch_size=128)) == (8146, 11)
    assert pack_sizes(lengths, config(max_length=2048, pack_tokens=8192, global_batch_size=4)) == (2800, 1)
    micro = config(max_length=2048, pack_tokens=8192, global_batch_size=128, micro_batch_size=4)
    assert pack_sizes(lengths, micro) == (2800, 32)
    lengths[0] = 5000
    assert pack_sizes(lengths, config(max_length=2048, pack_tokens=8192, global_batch_size=1)) == (2048, 1)
    with pytest.raises(ConfigError, match="no conversation"):
        pack_sizes(np.zeros(0, dtype=np.int64), config())


def test_settings_that_contradict_are_refused(tmp_path, project_folder):
    with pytest.raises(ValueError, match="pack_tokens=100 is less than max_length=256"):
        config(pack_tokens=100)
    settings = config()
    module, processor = fresh(settings)
    with pytest.raises(ConfigError, match="there are none here"):
        fit(module, processor, TrainingData(tiny_samples, 9, "tiny"), settings, 0, tmp_path, print, "test")


@pytest.mark.parametrize("lora", [True, False])
def test_a_preference_is_learned(data, tmp_path, lora):
    settings = config(max_steps=25, log_every_steps=5)
    module, processor = fresh(settings, lora=lora)
    module.preference = PreferenceConfig(weight=1.0, prompt="What is seen?")
    module.reference = None if lora else frozen_copy(module.model)
    logged = {}
    fit(module, processor, data, settings, 0, tmp_path, lambda metrics, step: logged.update({step: metrics}), "test")
    assert logged[25]["preference_loss"] < 0.8 * logged[5]["preference_loss"]
    assert logged[25]["preference_image_loss"] < logged[5]["preference_image_loss"]
    assert logged[25]["reward_margin"] > logged[5]["reward_margin"]
    assert "image_to_text_loss" in logged[25]


def test_a_preference_counts_every_pair_of_a_step_alike(data):
    settings = config(global_batch_size=18, pack_tokens=256)
    module, processor = fresh(settings, hacl=False)
    module.preference = PreferenceConfig(weight=1.0, prompt="What is seen?")
    with packed_feed(module, processor, data.source, "train", settings, 0) as feed:
        for step in feed.steps(0, None):
            parts = list(step.parts)
            pairs = [0 if part.batch.preference is None else part.batch.preference.num_pairs for part in parts]
            assert len(pairs) > 1
            assert [part.own_share for part in parts] == pytest.approx([each / sum(pairs) for each in pairs])
            break


@pytest.mark.parametrize(
    ("change", "warned"),
    [
        ({}, []),
        ({"hallucinated_captions": ()}, ["preference"]),
        ({"hallucinated_captions": (), "caption": None}, ["hacl", "preference"]),
    ],
)
def test_objectives_that_find_nothing_are_warned_of(change, warned, tmp_path, project_folder, caplog):
    samples = [dataclasses.replace(sample, **change) for sample in SAMPLES[:6]]
    uri = shard_folder((tmp_path / "data").as_uri(), tmp_path / "work", {"train": samples}, samples_per_shard=8).uri
    settings = config(max_steps=1)
    module, processor = fresh(settings)
    module.preference = PreferenceConfig(weight=0.5)
    with caplog.at_level("WARNING"):
        fit(module, processor, TrainingData.of(InputDirectory(uri), "train"), settings, 0, tmp_path, print, "test")
    said = [line.split(".weight=")[0].split()[-1] for line in caplog.text.splitlines() if "has no effect" in line]
    assert said == warned


def test_both_stages_train_from_packs(folder, tmp_path, project_folder):
    training = config(max_steps=3, max_length=128)
    pretrained = pretrain_projector.run(
        pretrain_projector.PretrainProjectorConfig(
            data_uri=folder.uri,
            output_uri=(tmp_path / "model").as_uri(),
            model=MODEL,
            alignment=AlignmentConfig(epochs=1, min_captions=1, max_share=1.0),
            training=training,
        )
    )
    assert "data_wait_share" in pretrained.metrics
    tuned = finetune.run(
        finetune.FinetuneConfig(
            data_uri=folder.uri,
            model_uri=pretrained.output_uri,
            output_uri=(tmp_path / "tuned").as_uri(),
            lora=LoraConfig(r=4, alpha=8),
            hacl=HaclConfig(weight=0.5),
            training=training,
        )
    )
    assert {"image_to_text_loss", "data_wait_share"} <= set(tuned.metrics)
    merged = merge_lora.run(
        merge_lora.MergeLoraConfig(adapter_uri=tuned.output_uri, output_uri=(tmp_path / "merged").as_uri())
    )
    config_file = InputDirectory(merged.output_uri).fetch("model/config.json").read_text()
    assert "shellv_documents" not in config_file
