"""Captions beside lies in batches and through a model: ends of texts, padding, mixed batches, preference pairs."""

from __future__ import annotations

import copy
from dataclasses import replace

import numpy as np
import pytest
import torch

from shellv_core.data.samples import HallucinatedCaption
from shellv_core.errors import ModelError
from shellv_core.models.compose import build_model
from shellv_core.models.config import LoraConfig, TokenizerConfig
from shellv_core.models.hacl import HaclHeads
from shellv_core.models.lora import add_lora
from shellv_core.templates import TEMPLATES
from shellv_core.training import pairs
from shellv_core.training.batches import batch_images, make_batch
from shellv_core.training.config import HaclConfig, PreferenceConfig, TrainingConfig
from shellv_core.training.examples import TYPES, image_bytes, tokenize_samples
from shellv_core.training.features import CachedFeatures, pixel_batches, tower_features
from shellv_core.training.loop import set_trainable
from shellv_core.training.model import TrainingModel, frozen_copy
from tests.conftest import SHARED
from tests.training.test_losses import mutated
from tests.training.tiny import tiny_model_config, tiny_samples

PROMPT = "What is seen?"
CODESHELL = SHARED / "tokenizers" / "codeshell"
TOKENIZERS = [
    "trained",
    pytest.param(
        "codeshell", marks=pytest.mark.skipif(not CODESHELL.is_dir(), reason="no tokenizer of CodeShell here")
    ),
]


def samples():
    """Texts of very different lengths; image 0 has a truth of its own for one lie, image 4 no caption, 5 no lie."""
    result = tiny_samples()
    long = " ".join(f"It was seen in street number {number}." for number in range(7))
    first = result[0].hallucinated_captions
    event = HallucinatedCaption(
        type="event", text="A red picture. A man sings.", truth="A red picture. Nobody is there."
    )
    result[0] = replace(result[0], hallucinated_captions=(first[0], event))
    result[1] = replace(result[1], caption=f"A green picture. {long}")
    result[2] = replace(result[2], hallucinated_captions=(HallucinatedCaption(type="unspecified", text="No."),))
    result[5] = replace(result[5], hallucinated_captions=())
    return result


class Parts:
    """A tiny model, examples and features."""

    def __init__(self, tokenizer):
        config = tiny_model_config()
        if tokenizer == "codeshell":
            config = config.model_copy(update={"tokenizer": TokenizerConfig(pretrained=str(CODESHELL))})
        texts = [
            text
            for sample in samples()
            for text in (sample.caption or "", *(h.text for h in sample.hallucinated_captions))
        ]
        self.model, self.processor = build_model(config, texts, seed=0)
        self.tokenizer = self.processor.tokenizer
        self.image_token_id = self.processor.image_token_id
        self.examples = tokenize_samples(samples(), self.tokenizer, self.image_token_id, 4, 256, prompt=PROMPT)
        self.pictures = torch.cat(list(pixel_batches(image_bytes(samples()), self.processor)))
        self.features = CachedFeatures(tower_features(self.model, self.pictures))

    def batch(self, rows, **options):
        rows = np.asarray(rows)
        images = batch_images(self.examples, rows)
        features = self.features.gather(images) if len(images) else None
        # What ends a text also pads it, as with CodeShell's tokenizer.
        pad = self.tokenizer.eos_token_id
        return make_batch(self.examples, rows, features, self.image_token_id, pad, **options)

    def module(self, hacl=None, **options):
        torch.manual_seed(0)
        heads = HaclHeads(32, (hacl or HaclConfig()).heads) if hacl else None
        module = TrainingModel(copy.deepcopy(self.model), heads, hacl, **options)
        set_trainable(module, TrainingConfig(trainable=("projector", "language_model")))
        return module


@pytest.fixture(scope="module", params=TOKENIZERS)
def parts(request):
    return Parts(request.param)


@pytest.fixture(scope="module")
def trained():
    return Parts("trained")


ALL = [0, 2, 4, 6, 8, 10, 12, 16]


def contrast_alone_equals_batch(parts):
    """Raise AssertionError where a text's or an image's features depend on what else is in its batch."""
    module = parts.module(HaclConfig(weight=1.0))
    with torch.no_grad():
        whole = module(parts.batch(ALL, num_hallucinated=2, truths=True)).features
        rows = [row for row in ALL if row not in (8, 16)]
        assert len(whole.image) == len(rows)
        for index, row in enumerate(rows):
            alone = module(parts.batch([row], num_hallucinated=2, truths=True)).features
            torch.testing.assert_close(alone.image[0], whole.image[index])
            torch.testing.assert_close(alone.caption[0], whole.caption[index])
            valid = alone.hallucinated_valid[0]
            assert valid.tolist() == whole.hallucinated_valid[index].tolist()
            torch.testing.assert_close(alone.hallucinated[0][valid], whole.hallucinated[index][valid])
            told = whole.truth_valid[index]
            assert told.tolist() == alone.truth_valid[0].tolist()
            if told.any():
                torch.testing.assert_close(alone.truth[0][told], whole.truth[index][told])


def test_a_batch_equals_its_samples_one_by_one(parts):
    lengths = parts.examples.captions.lengths
    assert lengths.max() > 3 * lengths[lengths > 0].min()
    contrast_alone_equals_batch(parts)


ENDS = "np.maximum(np.concatenate([each.lengths[rows] for each, rows in parts]) - 1, 0)"


@pytest.mark.parametrize(
    "fault",
    [
        "np.concatenate([np.full(len(r), max(e.lengths[i].max(initial=0) for e, i in parts) - 1) for _, r in parts])",
        "np.concatenate([np.full(len(rows), parts[0][0].lengths[parts[0][1][0]] - 1) for _, rows in parts])",
        "np.maximum(np.concatenate([each.lengths[rows] for each, rows in parts]) - 2, 0)",
    ],
    ids=["last column", "the first text's end for all", "the token before"],
)
def test_ends_that_are_not_the_texts_own_are_noticed(trained, monkeypatch, fault):
    module = mutated(pairs, ENDS, fault, monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr("shellv_core.training.batches.make_contrast", module.make_contrast)
        contrast = trained.batch(ALL, num_hallucinated=2, truths=True).contrast
        if fault.endswith("- 2, 0)"):
            ends = contrast.text_ids[torch.arange(len(contrast.text_ids)), contrast.text_ends]
            assert not (ends == trained.tokenizer.eos_token_id).all()
        else:
            with pytest.raises(AssertionError):
                contrast_alone_equals_batch(trained)


def test_texts_end_where_their_lengths_say(parts):
    contrast = parts.batch(ALL, num_hallucinated=2, truths=True).contrast
    eos = parts.tokenizer.eos_token_id
    assert [TYPES[index] for index in contrast.hallucinated_types[0]] == ["object", "event"]
    assert len(contrast.truth_slots) == contrast.truth_valid.sum() == 1
    texts = [
        parts.tokenizer.decode(ids[:end], skip_special_tokens=False)
        for ids, end in zip(contrast.text_ids, contrast.text_ends, strict=True)
    ]
    given = samples()
    captions = [given[index].caption for index in (0, 1, 2, 3, 5, 6)]
    assert [text.strip() for text in texts[:6]] == captions
    assert texts[-1].strip() == "A red picture. Nobody is there."
    for ids, end in zip(contrast.text_ids, contrast.text_ends, strict=True):
        assert (ids[end:] == eos).all()
        assert (ids[:end] != eos).all()


def test_a_literal_end_of_text_in_a_caption_ends_nothing(trained):
    given = samples()
    given[0] = replace(given[0], caption="A red </s> picture")
    examples = tokenize_samples(given, trained.tokenizer, trained.image_token_id, 4, 256)
    contrast = make_batch(
        examples, np.array([0]), None, trained.image_token_id, trained.tokenizer.eos_token_id, 1
    ).contrast
    assert trained.tokenizer.decode(contrast.text_ids[0, : contrast.text_ends[0]]).strip() == "A red </s> picture"


def test_truths_can_be_left_out(trained):
    contrast = trained.batch([0, 2], num_hallucinated=2).contrast
    assert len(contrast.truth_slots) == 0
    assert not contrast.truth_valid.any()
    assert contrast.hallucinated_valid.tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize("hacl", [{}, {"negatives": "paired"}, {"heads": "none"}, {"num_hallucinated": 0}])
def test_mixed_batches(trained, hacl):
    """Text-only rows, images without caption and captions without lie neither count nor harm."""
    module = trained.module(HaclConfig(weight=1.0, **hacl))
    captioned = [0, 2, 4, 10]
    options = {"num_hallucinated": module.hacl.num_hallucinated, "truths": True}
    with torch.no_grad():
        plain = module(trained.batch(captioned, **options)).contrast
        mixed = module(trained.batch([*captioned, 8, 16], **options)).contrast
        assert module(trained.batch([16], **options)).contrast is None
        assert module(trained.batch([8, 16], **options)).contrast is None
        without = module(trained.batch([10], **options)).contrast
    torch.testing.assert_close(mixed.objective(0.5), plain.objective(0.5), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(mixed.margin_counts, plain.margin_counts)
    assert float(without.objective(0.5)) == pytest.approx(0.0, abs=1e-6)
    assert without.margin_counts.sum() == 0


def test_heads_none_compares_hidden_states(trained):
    module = trained.module(HaclConfig(weight=1.0, heads="none"))
    assert [name for name, _ in module.heads.named_parameters()] == ["temperature"]
    states = torch.randn(3, 32)
    torch.testing.assert_close(module.heads.embed_images(states), states / states.norm(dim=-1, keepdim=True))


# Preference.


def answers_of(parts, batch):
    """Each row's prompt and answer, decoded."""
    result = []
    for row in range(len(batch.input_ids)):
        mine = batch.label_rows == row
        columns = batch.label_positions[mine] - row * batch.input_ids.shape[1] + 1
        assert batch.input_ids[row, columns].tolist() == batch.label_ids[mine].tolist()
        result.append(parts.tokenizer.decode(batch.label_ids[mine], skip_special_tokens=True).strip())
    return result


def test_pairs_are_caption_or_truth_against_the_lie_whose_turn_it_is(parts):
    # Images 0, 1, 4 (no caption), 5 (no lie): pairs of 0 and 1.
    batch = parts.batch([0, 2, 8, 10, 16], preference=True, turn=1).preference
    assert batch.num_pairs == 2
    assert answers_of(parts, batch) == [
        "A red picture. Nobody is there.",
        samples()[1].caption,
        "A red picture. A man sings.",
        samples()[1].hallucinated_captions[0].text,
        "A red picture. Nobody is there.",
        samples()[1].caption,
    ]
    assert batch.row_images.tolist() == [0, 1, 0, 1, 1, 2]
    assert batch.elsewhere.tolist() == [0, 1]
    batch = parts.batch([0, 2], preference=True, turn=0).preference
    assert answers_of(parts, batch)[:2] == [samples()[0].caption, samples()[1].caption]


def test_pairs_without_another_image_or_without_difference(trained):
    assert trained.batch([16], preference=True).preference is None
    assert trained.batch([8, 10, 16], preference=True).preference is None
    assert trained.batch([2], preference=True).preference.elsewhere.tolist() == []
    given = [replace(sample, caption="Same.") for sample in samples()[:3]]
    given[2] = replace(given[2], hallucinated_captions=(HallucinatedCaption(type="object", text="Same."),))
    examples = tokenize_samples(given, trained.tokenizer, trained.image_token_id, 4, 256, prompt=PROMPT)
    batch = make_batch(examples, np.array([0, 2, 4]), None, trained.image_token_id, 0, preference=True).preference
    assert batch.num_pairs == 2, "a lie that says what the caption says is no pair"
    assert batch.elsewhere.tolist() == [], "an image with the same caption is no other image"
    with pytest.raises(ValueError, match="hold no answers"):
        make_batch(replace(examples, answers=None), np.array([0]), None, 0, 0, preference=True)


@pytest.mark.parametrize("template", TEMPLATES)
def test_answers_are_what_the_template_lets_learn(trained, template):
    from shellv_core.data.conversation import IGNORE_INDEX, encode_conversation
    from shellv_core.templates import add_template_tokens

    tokenizer = copy.deepcopy(trained.tokenizer)
    add_template_tokens(tokenizer, TEMPLATES[template])
    given = [replace(each, more_conversations=(), conversations=each.conversations[:2]) for each in samples()[:3]]
    examples = tokenize_samples(
        given, tokenizer, trained.image_token_id, 4, 256, template=TEMPLATES[template], prompt=PROMPT
    )
    talk = [{"from": "human", "value": f"<image>\n{PROMPT}"}, {"from": "gpt", "value": samples()[1].caption}]
    ids, labels = encode_conversation(tokenizer, talk, trained.image_token_id, 4, 256, TEMPLATES[template])
    whole = np.concatenate([examples.answers.prompt_ids, examples.answers.captions.at(1)])
    assert whole.tolist() == ids[: len(whole)].tolist()
    assert examples.answers.captions.at(1).tolist() == labels[labels != IGNORE_INDEX].tolist()


def naive_log_probability(parts, model, text, image):
    """Of an answer, by the stock model with pixels and labels."""
    from shellv_core.data.conversation import encode_conversation

    talk = [{"from": "human", "value": f"<image>\n{PROMPT}"}, {"from": "gpt", "value": text}]
    ids, labels = encode_conversation(parts.tokenizer, talk, parts.image_token_id, 4, 256)
    labels = torch.from_numpy(labels.astype(np.int64))[None]
    loss = model(
        input_ids=torch.from_numpy(ids.astype(np.int64))[None], labels=labels, pixel_values=parts.pictures[image][None]
    ).loss
    return -loss * (labels[:, 1:] != -100).sum()


@pytest.mark.parametrize("lora", [True, False])
def test_preference_equals_the_stock_model_row_by_row(parts, lora):
    """Rewards against the model as it was, by LoRA switched off or by a frozen copy."""
    settings = PreferenceConfig(weight=1.0, beta=0.3, anchor=0.2, prompt=PROMPT)
    module = parts.module(preference=settings)
    if lora:
        add_lora(module.model, LoraConfig(r=2), seed=1)
    else:
        module.reference = frozen_copy(module.model)
    with torch.no_grad():
        for name, parameter in module.model.named_parameters():
            if parameter.requires_grad:
                parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(len(name))))
    rows, images = [0, 2, 12], [0, 1, 6]
    with torch.no_grad():
        result = module(parts.batch(rows, preference=True)).preference
        given = samples()
        expected = {"margin": [], "image": [], "anchor": []}
        for index, image in enumerate(images):
            lie = given[image].hallucinated_captions[image % len(given[image].hallucinated_captions)].text
            caption, other = given[image].caption, images[(index + 1) % 3]

            def reward(text, image):
                change = naive_log_probability(parts, module.model, text, image)
                return 0.3 * float(change - naive_log_probability(parts, parts.model, text, image))

            chosen = reward(caption, image)
            expected["margin"].append(chosen - reward(lie, image))
            expected["image"].append(chosen - reward(caption, other))
            expected["anchor"].append(chosen - 0.2)
    values = {key: torch.tensor(each) for key, each in expected.items()}
    assert values["margin"].abs().min() > 0.01
    options = {"rtol": 1e-3, "atol": 1e-4}
    torch.testing.assert_close(result.reward_margin, values["margin"].mean(), **options)
    torch.testing.assert_close(result.image_reward_margin, values["image"].mean(), **options)
    for name, key in (("answer", "margin"), ("image", "image"), ("anchor", "anchor")):
        torch.testing.assert_close(
            getattr(result, name), -torch.nn.functional.logsigmoid(values[key]).mean(), **options
        )


@pytest.mark.parametrize("autocast", [False, True])
def test_preference_reaches_what_is_trained_and_leaves_the_reference(trained, autocast):
    module = trained.module(preference=PreferenceConfig(weight=1.0, prompt=PROMPT))
    add_lora(module.model, LoraConfig(r=2, dropout=0.3), seed=1)
    trainable = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    module.train()
    modes = [each.training for each in module.modules()]
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = module(trained.batch([0, 2, 12], preference=True))
    output.preference.objective(1.0, 1.0).backward()
    assert {name for name, parameter in module.named_parameters() if parameter.requires_grad} == trainable
    assert [each.training for each in module.modules()] == modes
    moved = {
        name for name, parameter in module.named_parameters() if parameter.grad is not None and parameter.grad.any()
    }
    assert any("lora_B" in name for name in moved)
    assert any("projector" in name for name in moved)
    assert moved <= trainable


def test_a_reference_is_needed(trained):
    module = trained.module(preference=PreferenceConfig(weight=1.0, prompt=PROMPT))
    with pytest.raises(ModelError, match="no adapters to leave out"):
        module(trained.batch([0, 2], preference=True))


def test_a_frozen_copy_shares_what_is_frozen(trained):
    module = trained.module()
    copied = frozen_copy(module.model)
    mine, its = dict(module.model.named_parameters()), dict(copied.named_parameters())
    assert mine.keys() == its.keys()
    assert not any(each.requires_grad for each in its.values())
    for name, parameter in mine.items():
        assert (its[name] is parameter) == (not parameter.requires_grad), name
    assert any(not parameter.requires_grad for parameter in mine.values())
