"""The loop: what it learns, what it counts, and that a killed run ends like one that was not."""

from __future__ import annotations

import copy
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from shellv_core.config import build_config
from shellv_core.errors import ConfigError, TrainingError
from shellv_core.models.config import LoraConfig
from shellv_core.models.hacl import HaclHeads
from shellv_core.models.lora import add_lora
from shellv_core.training.batches import batch_images, make_batch
from shellv_core.training.checkpoints import Checkpoints, read_checkpoint
from shellv_core.training.config import HaclConfig, PreferenceConfig, TrainingConfig
from shellv_core.training.engines.base import build_optimizer
from shellv_core.training.examples import image_bytes, tokenize_samples
from shellv_core.training.features import CachedFeatures, pixel_batches, tower_features
from shellv_core.training.fit import TrainingData, fit
from shellv_core.training.history import HISTORY_NAME, read_history
from shellv_core.training.loop import learning_rate_factor, set_trainable, total_steps, train
from shellv_core.training.model import TrainingModel, frozen_copy
from tests.training.tiny import tiny_model, tiny_samples

BOTH = ("projector", "language_model")


def config(**values):
    defaults = {
        "global_batch_size": 6,
        "max_steps": 6,
        "trainable": BOTH,
        "projector_learning_rate": 1e-2,
        "language_model_learning_rate": 1e-2,
        "log_every_steps": 2,
        "checkpoint_every_steps": 2,
        "max_length": 256,
    }
    return TrainingConfig(**{**defaults, **values})


@pytest.fixture(scope="module")
def parts():
    model, processor = tiny_model()
    examples = tokenize_samples(
        tiny_samples(), processor.tokenizer, processor.image_token_id, 4, 256, prompt="What is it?"
    )
    pictures = list(pixel_batches(image_bytes(tiny_samples()), processor))
    features = torch.cat([tower_features(model, batch) for batch in pictures])
    return model, processor, examples, CachedFeatures(features), torch.cat(pictures)


def module_of(parts, settings, hacl=None, preference=None):
    model = copy.deepcopy(parts[0])
    torch.manual_seed(0)
    heads = HaclHeads(model.config.text_config.hidden_size) if hacl else None
    module = TrainingModel(model, heads, hacl, preference)
    set_trainable(module, settings)
    return module


def run(parts, settings, directory, hacl=None, seed=0):
    module = module_of(parts, settings, hacl)
    logged = {}
    summary = train(
        module, parts[2], parts[3], settings, seed, directory, lambda metrics, step: logged.update({step: metrics})
    )
    return module, summary, logged


def test_loss_equals_llavas_own(parts):
    """The batch form (no mask, head at labels only, cached features) against the stock model with labels."""
    model, _, examples, features, pictures = parts
    rows = np.array([0, 3, 5])
    images = batch_images(examples, rows)
    batch = make_batch(examples, rows, features.gather(images), model.config.image_token_id, 0)
    with torch.no_grad():
        mine = TrainingModel(model)(batch).generation_loss_sum / len(batch.label_ids)
        losses, counts = [], []
        for row in rows:
            ids = torch.from_numpy(examples.input_ids.padded(np.array([row]), 0))
            labels = torch.from_numpy(examples.labels.padded(np.array([row]), -100))
            picture = pictures[examples.image_index[row]][None]
            losses.append(model(input_ids=ids, labels=labels, pixel_values=picture).loss)
            counts.append((labels[:, 1:] != -100).sum())
    expected = sum(loss * count for loss, count in zip(losses, counts, strict=True)) / sum(counts)
    torch.testing.assert_close(mine, expected)


def test_contrastive_states_are_those_of_separate_unpadded_passes(parts):
    model, _, examples, features, _ = parts
    rows = np.array([0, 2, 4])
    module = module_of(parts, config(), HaclConfig(weight=1.0, num_hallucinated=2))
    batch = make_batch(examples, rows, features.gather(batch_images(examples, rows)), model.config.image_token_id, 0, 2)
    seen = {}
    for name in ("embed_images", "embed_texts"):
        original = getattr(module.heads, name)
        setattr(module.heads, name, lambda x, name=name, original=original: seen.setdefault(name, original(x)))
    with torch.no_grad():
        module(batch)
        embed = module.model.get_input_embeddings()
        eos = embed(torch.tensor([[module.eos_token_id]]))
        decoder = module.model.model.language_model
        for index, image in enumerate((0, 1, 2)):
            projected = module.model.model.multi_modal_projector(features.gather(np.array([image])))
            conversation = torch.from_numpy(examples.input_ids.at(rows[index]).astype(np.int64))[None]
            begun = embed(conversation[:, : conversation[0].tolist().index(model.config.image_token_id)])
            assert begun.shape[1] > 0, "the user's turn opens before the image"
            state = decoder(inputs_embeds=torch.cat([begun, projected, eos], 1)).last_hidden_state[:, -1]
            torch.testing.assert_close(
                type(module.heads).embed_images(module.heads, state)[0], seen["embed_images"][index]
            )
            caption = torch.from_numpy(examples.captions.padded(np.array([image]), 0))
            state = decoder(inputs_embeds=embed(caption)).last_hidden_state[:, -1]
            torch.testing.assert_close(
                type(module.heads).embed_texts(module.heads, state)[0], seen["embed_texts"][index]
            )


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_learns_and_reports(parts, tmp_path, precision):
    settings = config(max_steps=40, precision=precision, log_every_steps=10)
    module, summary, logged = run(parts, settings, tmp_path, HaclConfig(weight=0.5))
    assert list(logged) == [10, 20, 30, 40]
    assert logged[40]["generation_loss"] < 0.5 * logged[10]["generation_loss"]
    assert logged[40]["image_to_text_loss"] < logged[10]["image_to_text_loss"]
    assert set(logged[40]) == {
        "generation_loss",
        "image_to_text_loss",
        "text_to_image_loss",
        "retrieval_accuracy",
        "hallucination_margin",
        "hallucination_accuracy",
        "hallucination_margin_object",
        "hallucination_margin_attribute",
        "temperature",
        "loss",
        "gradient_norm",
        "samples_per_second",
        "tokens_per_second",
        "useful_token_share",
        "peak_memory_gb",
        "learning_rate",
    }
    assert summary.num_steps == 40
    assert set(summary.metrics) == set(logged[40]) - {"learning_rate"}
    history = read_history(tmp_path / HISTORY_NAME)
    assert [step for step, _ in history] == [10, 20, 30, 40]
    assert history[-1][1] == logged[40]
    assert 0.001 <= float(module.heads.temperature.detach()) <= 0.5
    assert not module.training
    assert module.model.model.language_model.config._attn_implementation == "sdpa"


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        (("projector",), {"multi_modal_projector"}),
        (("language_model",), {"language_model", "lm_head"}),
        (BOTH, {"multi_modal_projector", "language_model", "lm_head"}),
    ],
)
def test_only_what_is_named_changes(parts, tmp_path, trainable, expected):
    module, _, _ = run(parts, config(trainable=trainable, max_steps=2), tmp_path)
    before = parts[0].state_dict()
    changed = {name for name, value in module.model.state_dict().items() if not torch.equal(value, before[name])}
    assert {name.split(".")[1] if name.startswith("model.") else name.split(".")[0] for name in changed} == expected


def test_accumulation_gives_the_same_step(parts, tmp_path):
    whole, _, _ = run(parts, config(max_steps=3), tmp_path / "whole")
    pieces, _, _ = run(parts, config(max_steps=3, micro_batch_size=2), tmp_path / "pieces")
    for name, value in whole.state_dict().items():
        torch.testing.assert_close(pieces.state_dict()[name], value, atol=2e-4, rtol=1e-3, msg=name)


def test_same_seed_same_weights_other_seed_others(parts, tmp_path):
    runs = [run(parts, config(), tmp_path / str(index), seed=seed)[0] for index, seed in enumerate((3, 3, 4))]
    first, again, other = (module.state_dict() for module in runs)
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("stop", [1, 3, 4])
def test_interrupted_run_ends_like_an_uninterrupted_one(parts, tmp_path, stop):
    """Across an epoch's end (17 conversations, 6 a step), with adapters, dropout, a queue and both objectives."""
    settings = config(max_steps=5, checkpoint_every_steps=1)
    hacl = HaclConfig(weight=0.5, queue_size=11, weight_schedule="cosine", weight_warmup_ratio=0.4)

    def fresh():
        module = module_of(parts, settings, hacl, PreferenceConfig(weight=0.3))
        add_lora(module.model, LoraConfig(r=2, dropout=0.2))
        return module

    class Killed(Exception):
        pass

    def killer(metrics, step):
        if step > stop:
            raise Killed

    def go(module, directory, log=lambda metrics, step: None, settings=settings):
        train(module, parts[2], parts[3], settings, 0, directory, log)
        return {name: value.clone() for name, value in module.state_dict().items()}

    settings = settings.model_copy(update={"log_every_steps": 1})
    expected = go(fresh(), tmp_path / "whole", settings=settings)
    with pytest.raises(Killed):
        go(fresh(), tmp_path / "cut", killer, settings)
    resumed = go(fresh(), tmp_path / "cut", settings=settings)
    assert all(torch.equal(resumed[name], expected[name]) for name in expected)
    whole, cut = (read_history(tmp_path / name / HISTORY_NAME) for name in ("whole", "cut"))
    assert [(step, metrics["loss"]) for step, metrics in cut] == [(step, metrics["loss"]) for step, metrics in whole]


def test_checkpoint_of_another_run_is_refused(parts, tmp_path):
    run(parts, config(max_steps=2), tmp_path)
    with pytest.raises(TrainingError, match="other data or settings"):
        run(parts, config(max_steps=3), tmp_path)


def test_settings_that_change_no_weight_may_change_between_tries(parts, tmp_path):
    run(parts, config(max_steps=2), tmp_path)
    changed = {"checkpoint_every_steps": 1, "log_every_steps": 1, "checkpoint_keep": 1, "divergence_factor": None}
    _, _, logged = run(parts, config(max_steps=2, **changed), tmp_path)
    assert logged == {}


def test_queue_is_part_of_the_state(parts, tmp_path):
    hacl = HaclConfig(weight=0.5, queue_size=11)
    first, _, logged = run(parts, config(max_steps=4, log_every_steps=1), tmp_path, hacl)
    assert logged[1]["queue_fill"] < logged[4]["queue_fill"] == 1.0
    again = module_of(parts, config(), hacl)
    assert again.queue.fill() == 0
    again, _, _ = run(parts, config(max_steps=4, log_every_steps=1), tmp_path, hacl)
    buffers = dict(first.queue.named_buffers())
    assert all(torch.equal(each, buffers[name]) for name, each in again.queue.named_buffers())
    assert buffers["texts.features"].norm(dim=1).allclose(torch.ones(11))
    with pytest.raises(TrainingError, match="other data or settings"):
        run(parts, config(max_steps=4, log_every_steps=1), tmp_path, hacl.model_copy(update={"queue_size": 12}))
    checkpoint = read_checkpoint(tmp_path / "step-4")
    state = {name: each for name, each in checkpoint.tensors().items() if name != "queue.images.count"}
    with Checkpoints(tmp_path, None, checkpoint.identity) as checkpoints:
        checkpoints.save(4, state, checkpoint.meta)
    with pytest.raises(TrainingError, match="another queue"):
        run(parts, config(max_steps=4, log_every_steps=1), tmp_path, hacl)


def test_a_queue_changes_what_is_learned(parts, tmp_path):
    """From the second step on; the first has nothing in it."""
    settings = config(max_steps=2, log_every_steps=1)
    plain, queued = (
        run(parts, settings, tmp_path / str(size), HaclConfig(weight=0.5, queue_size=size))[2] for size in (0, 11)
    )
    for name in ("image_to_text_loss", "text_to_image_loss"):
        assert queued[1][name] == pytest.approx(plain[1][name], rel=1e-5)
        assert queued[2][name] > plain[2][name] + 1e-3


@pytest.mark.parametrize("start", [0.45, 0.05])
def test_temperature_stays_within_its_range(parts, tmp_path, start):
    """With steps of about 1, it would leave the range at once."""
    settings = config(max_steps=2, log_every_steps=1, warmup_ratio=0.0)
    module = module_of(parts, settings, HaclConfig(weight=1.0, learning_rate=1.0))
    with torch.no_grad():
        module.heads.temperature.fill_(start)
    logged = []
    train(
        module, parts[2], parts[3], settings, 0, tmp_path, lambda metrics, step: logged.append(metrics["temperature"])
    )
    assert logged[0] in (pytest.approx(0.001), pytest.approx(0.5))
    assert all(0.001 - 1e-9 <= each <= 0.5 for each in logged)


def test_weight_follows_its_schedule(parts, tmp_path):
    hacl = HaclConfig(weight=0.5, weight_schedule="linear", weight_warmup_ratio=0.5)
    _, _, logged = run(parts, config(max_steps=6, log_every_steps=1), tmp_path, hacl)
    for step, factor in zip(range(1, 7), (1 / 3, 2 / 3, 1, 1, 1, 1), strict=True):
        metrics = logged[step]
        contrast = (metrics["image_to_text_loss"] + metrics["text_to_image_loss"]) / 2
        expected = metrics["generation_loss"] + 0.5 * factor * contrast
        assert metrics["loss"] == pytest.approx(expected, rel=1e-5)


def test_margins_by_type_are_means_over_pairs_whatever_the_micro_batch(parts, tmp_path):
    hacl = HaclConfig(weight=0.5, num_hallucinated=2)
    settings = config(max_steps=1, log_every_steps=1)
    whole, pieces = (
        run(parts, settings.model_copy(update={"micro_batch_size": size}), tmp_path / str(size), hacl)[2][1]
        for size in (None, 1)
    )
    for kind in ("object", "attribute"):
        name = f"hallucination_margin_{kind}"
        # Of an image in two conversations of the step, both micro-batches speak.
        assert pieces[name] == pytest.approx(whole[name], abs=0.15)
    assert "hallucination_margin_event" not in whole


def test_preference_is_learned_and_reported(parts, tmp_path):
    settings = config(max_steps=30, log_every_steps=10, language_model_learning_rate=3e-3)
    module = module_of(parts, settings, None, PreferenceConfig(weight=1.0, beta=0.5))
    module.reference = frozen_copy(module.model)
    before = {name: each.clone() for name, each in module.reference.state_dict().items()}
    logged = {}
    train(module, parts[2], parts[3], settings, 0, tmp_path, lambda metrics, step: logged.update({step: metrics}))
    assert {
        "preference_loss",
        "preference_image_loss",
        "preference_anchor_loss",
        "reward_margin",
        "image_reward_margin",
        "preference_accuracy",
    } <= set(logged[30])
    assert logged[30]["reward_margin"] > logged[10]["reward_margin"]
    assert logged[30]["reward_margin"] > 0.5
    assert logged[30]["preference_accuracy"] > 0.9
    assert logged[30]["preference_loss"] < logged[10]["preference_loss"]
    assert all(torch.equal(each, before[name]) for name, each in module.reference.state_dict().items())
    assert not any("reference" in name for name in read_checkpoint(tmp_path / "step-30").tensors())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"weight_warmup_ratio": 0.1}, "constant weight has no warm-up"),
        ({"weight_schedule": "linear"}, "linear is a warm-up"),
        ({"queue_size": 16, "gather": False}, "queue_size needs gather=true"),
        ({"text_margin_weight": 1.0, "num_hallucinated": 0}, "needs hallucinated captions"),
        ({"text_margin_weight": 1.0, "text_margin": 0.0}, "no effect with text_margin=0"),
    ],
)
def test_settings_that_would_do_nothing_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        build_config(HaclConfig, values)


def test_one_folder_for_the_checkpoints_of_all_runs_is_refused():
    with pytest.raises(ConfigError, match=r"one folder for all runs; put \{fingerprint\} into it"):
        build_config(TrainingConfig, {"checkpoint_uri": "s3://bucket/checkpoints"})


def test_objectives_without_data_are_not_silent(tmp_path, caplog):
    model, processor = tiny_model()
    module = TrainingModel(model, HaclHeads(32), HaclConfig(weight=1.0), PreferenceConfig(weight=0.5))
    settings = config(max_steps=1)
    set_trainable(module, settings)
    data = TrainingData(lambda: tiny_samples(0), 1, "text")
    with caplog.at_level("WARNING"):
        fit(module, processor, data, settings, 0, tmp_path, lambda metrics, step: None, "test")
    assert "hacl.weight=1.0 has no effect: no image has a caption" in caplog.text
    assert "preference.weight=0.5 has no effect" in caplog.text


def test_finished_run_does_no_step_again(parts, tmp_path):
    first, _, _ = run(parts, config(), tmp_path)
    again, summary, logged = run(parts, config(), tmp_path)
    assert logged == {}
    assert summary.num_steps == 6
    assert all(torch.equal(first.state_dict()[name], value) for name, value in again.state_dict().items())


def test_loss_that_is_not_finite_names_the_step(parts, tmp_path):
    module = module_of(parts, config())
    with torch.no_grad():
        module.model.model.multi_modal_projector.linear_1.weight[0, 0] = float("nan")
    before = module.model.lm_head.weight.clone()
    with pytest.raises(TrainingError, match="at step 1; lower the learning rates"):
        train(module, parts[2], parts[3], config(), 0, tmp_path, lambda metrics, step: None)
    assert torch.equal(module.model.lm_head.weight, before)


@pytest.mark.parametrize(("rate", "fault"), [(3.0, "explodes: it is"), (30.0, "gradient norm (nan|inf)")])
def test_an_absurd_learning_rate_stops_with_the_last_good_checkpoint_named(parts, tmp_path, rate, fault):
    absurd = {"projector_learning_rate": rate, "language_model_learning_rate": rate, "warmup_ratio": 0.5}
    settings = config(max_steps=60, checkpoint_every_steps=1, **absurd)
    with pytest.raises(TrainingError, match=rf"{fault}.* at step \d+") as caught:
        run(parts, settings, tmp_path)
    step, path = re.search(r"last good checkpoint is that of step (\d+), (.+)\.", str(caught.value)).groups()
    last = read_checkpoint(Path(path))
    assert last.step == int(step) == max(int(each.name[5:]) for each in tmp_path.glob("step-*"))
    stopped = int(re.search(r"at step (\d+)", str(caught.value))[1])
    assert last.step <= stopped - settings.divergence_steps or "nan" in fault, "it is from before the trouble"
    assert all(each.isfinite().all() for each in last.tensors().values())


def test_nothing_trainable(parts, tmp_path):
    module = module_of(parts, config()).requires_grad_(False)
    with pytest.raises(TrainingError, match="nothing is trainable"):
        train(module, parts[2], parts[3], config(), 0, tmp_path, lambda metrics, step: None)


def test_learning_rates_go_to_their_parts(parts):
    settings = config(projector_learning_rate=0.3, language_model_learning_rate=0.2, weight_decay=0.1)
    module = module_of(parts, settings, HaclConfig(weight=1.0, learning_rate=0.1))
    optimizer = build_optimizer(module, settings)
    found = {
        (group["base_lr"], group["weight_decay"]): {id(parameter) for parameter in group["params"]}
        for group in optimizer.param_groups
    }
    assert id(module.model.model.multi_modal_projector.linear_1.weight) in found[0.3, 0.1]
    assert id(module.model.lm_head.weight) in found[0.2, 0.1]
    assert id(module.model.model.language_model.norm.weight) in found[0.2, 0.0]
    assert id(module.heads.temperature) in found[0.1, 0.0]


def test_schedule_warms_up_and_falls_to_zero():
    factors = [learning_rate_factor(step, 100, 0.03) for step in range(1, 101)]
    assert factors[:4] == [1 / 3, 2 / 3, 1, 1]
    assert factors == sorted(factors[:3]) + sorted(factors[3:], reverse=True)
    assert 0 < factors[-1] < 1e-3
    assert total_steps(17, config(max_steps=None, epochs=2)) == 6
    assert total_steps(17, config(max_steps=None, epochs=0.5)) == 2


@pytest.mark.parametrize("cache_features", [True, False])
def test_fit_runs_from_samples(tmp_path, project_folder, cache_features):
    model, processor = tiny_model()
    module = TrainingModel(model)
    settings = config(max_steps=2, cache_features=cache_features)
    set_trainable(module, settings)
    data = TrainingData(tiny_samples, 9, "tiny")
    summary = fit(module, processor, data, settings, 0, tmp_path, lambda metrics, step: None, "test")
    assert summary.metrics["loss"] > 0
    assert (project_folder / "cache" / "features").exists() == cache_features


def test_fit_on_text_alone(tmp_path):
    model, processor = tiny_model()
    module = TrainingModel(model, HaclHeads(32), HaclConfig(weight=1.0))
    settings = config(max_steps=2)
    set_trainable(module, settings)
    data = TrainingData(lambda: tiny_samples(0), 1, "text")
    summary = fit(module, processor, data, settings, 0, tmp_path, lambda metrics, step: None, "test")
    assert "image_to_text_loss" not in summary.metrics
