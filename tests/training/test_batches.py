from dataclasses import replace

import numpy as np
import pytest
import torch

from shellv_core.data.conversation import IGNORE_INDEX
from shellv_core.errors import DataError
from shellv_core.templates import TEMPLATES
from shellv_core.training.batches import batch_images, count_label_tokens, make_batch, plan_epoch, steps_per_epoch
from shellv_core.training.examples import Ragged, image_bytes, tokenize_samples
from shellv_core.training.model import TrainingModel
from tests.training.tiny import tiny_model, tiny_samples


@pytest.fixture(scope="module")
def processor():
    return tiny_model()[1]


@pytest.fixture(scope="module")
def examples(processor):
    return tokenize_samples(tiny_samples(), processor.tokenizer, processor.image_token_id, 4, 256)


def test_epoch_is_a_pure_function_of_seed_and_number():
    lengths = np.random.default_rng(0).integers(20, 200, 1000)
    first, again = (plan_epoch(lengths, 32, 7, 3) for _ in range(2))
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert sorted(np.concatenate(first)) == list(range(1000))
    assert len(first) == steps_per_epoch(1000, 32) == 32
    for other in (plan_epoch(lengths, 32, 8, 3), plan_epoch(lengths, 32, 7, 4)):
        assert not all((a == b).all() for a, b in zip(first, other, strict=True) if len(a) == len(b))


def test_buckets_leave_little_padding_and_keep_the_shuffle():
    lengths = np.random.default_rng(0).integers(20, 200, 6400)
    batches = plan_epoch(lengths, 32, 0, 0)
    padded = sum(lengths[rows].max() * len(rows) for rows in batches)
    assert 1 - lengths.sum() / padded < 0.05
    means = [lengths[rows].mean() for rows in batches]
    assert abs(np.corrcoef(means[:-1], means[1:])[0, 1]) < 0.2


def test_ragged_pads_any_rows():
    ragged = Ragged.of([np.array(values, dtype=np.int32) for values in ([1, 2, 3], [], [4])])
    assert ragged.padded(np.array([2, 0, 1]), 9).tolist() == [[4, 9, 9], [1, 2, 3], [9, 9, 9]]
    assert ragged.padded(np.array([], dtype=int), 9).shape == (0, 0)
    assert Ragged.of([]).padded(np.array([], dtype=int), 9).shape == (0, 0)


def test_examples_number_conversations_and_images(examples):
    assert len(examples) == 8 * 2 + 1
    assert examples.num_images == len(list(image_bytes(tiny_samples()))) == 8
    assert examples.image_index.tolist() == [*np.repeat(np.arange(8), 2), -1]
    assert examples.captions.lengths[4] == 0
    assert np.diff(examples.hallucinated_offsets).tolist() == [2, 1, 2, 1, 0, 1, 2, 1]


def test_examples_follow_the_template(processor):
    ids = processor.tokenizer, processor.image_token_id
    shellv = tokenize_samples(tiny_samples(), *ids, 4, 400, template=TEMPLATES["shellv"])
    text = processor.tokenizer.decode(shellv.input_ids.values[: shellv.input_ids.offsets[1]])
    assert text.startswith("## system:You are a helpful assistant.")
    assert "</s>## huaman:<image><image><image><image>\n" in text


def test_batch_holds_what_its_rows_hold(processor, examples):
    rows = np.array([3, 16, 0, 2])
    batch = make_batch(examples, rows, None, processor.image_token_id, processor.tokenizer.pad_token_id)
    assert batch_images(examples, rows).tolist() == [0, 1]
    assert batch.row_images.tolist() == [1, 0, 1]
    width = batch.input_ids.shape[1]
    assert batch.num_tokens == examples.input_ids.lengths[rows].sum()
    for index, row in enumerate(rows):
        ids = examples.input_ids.padded(np.array([row]), 0)[0]
        labels = examples.labels.padded(np.array([row]), IGNORE_INDEX)[0]
        assert batch.input_ids[index, : len(ids)].tolist() == ids.tolist()
        assert (batch.input_ids[index, len(ids) :] == processor.tokenizer.pad_token_id).all()
        mine = (batch.label_positions // width) == index
        predicted = batch.label_positions[mine] % width + 1
        assert predicted.tolist() == np.flatnonzero(labels != IGNORE_INDEX).tolist()
        assert batch.label_ids[mine].tolist() == labels[labels != IGNORE_INDEX].tolist()
    assert len(batch.label_ids) == count_label_tokens(examples, rows)
    assert (batch.input_ids.flatten()[batch.image_positions] == processor.image_token_id).all()
    assert len(batch.image_positions) == 3 * 4


def test_contrast_takes_each_captioned_image_once(processor, examples):
    rows = np.array([0, 1, 8, 9, 2, 16])  # images 0, 4 (no caption) and 1
    pad = processor.tokenizer.pad_token_id
    batch = make_batch(examples, rows, None, processor.image_token_id, pad, num_hallucinated=2, turn=5)
    contrast = batch.contrast
    assert contrast.images.tolist() == [0, 1]
    assert contrast.hallucinated_valid.tolist() == [[True, True], [True, False]]
    texts = [
        processor.tokenizer.decode(ids[: end + 1])
        for ids, end in zip(contrast.text_ids, contrast.text_ends, strict=True)
    ]
    assert texts[:2] == ["A red picture with number 0.</s>", "A green picture with number 1.</s>"]
    assert set(texts[2:4]) == {"A green picture with object 0.</s>", "A green picture with attribute 0.</s>"}
    assert texts[4] == "A blue picture with object 1.</s>"
    only_text = make_batch(examples, np.array([16, 8]), None, processor.image_token_id, pad, num_hallucinated=1)
    assert only_text.contrast is None


def test_hallucinated_captions_take_turns(processor, examples):
    seen = set()
    for turn in range(2):
        batch = make_batch(examples, np.array([0]), None, processor.image_token_id, 0, num_hallucinated=1, turn=turn)
        seen.add(int(batch.contrast.hallucinated_groups[0, 0]))
    assert len(seen) == 2


def test_no_hallucinated_captions_at_all(processor):
    samples = [replace(sample, hallucinated_captions=()) for sample in tiny_samples()]
    examples = tokenize_samples(samples, processor.tokenizer, processor.image_token_id, 4, 256)
    batch = make_batch(examples, np.array([0, 2]), None, processor.image_token_id, 0, num_hallucinated=2)
    assert batch.contrast.hallucinated_valid.shape == (2, 0)
    assert len(batch.contrast.text_ids) == 2


def test_image_and_its_token_go_together(processor):
    sample = tiny_samples(1, with_text_only=False)[0]
    blind = replace(sample, conversations=[{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}])
    imageless = replace(sample, image=None)
    for broken, message in ((blind, "holds 0 image tokens, 4 are expected"), (imageless, "4 image tokens, 0")):
        with pytest.raises(DataError, match=message):
            tokenize_samples([broken], processor.tokenizer, processor.image_token_id, 4, 256)
    with pytest.raises(DataError, match="no conversation to train on"):
        tokenize_samples([], processor.tokenizer, processor.image_token_id, 4, 256)


def test_moves_between_devices(processor, examples):
    batch = make_batch(examples, np.array([0, 2]), torch.zeros(2, 4, 3), processor.image_token_id, 0, 1)
    moved = batch.to(torch.device("meta"))
    assert moved.input_ids.is_meta
    assert moved.image_features.is_meta
    assert moved.contrast.text_ids.is_meta


def test_ends_of_turns_are_attended_to_where_padding_is_end_of_text():
    """Upstream hides them: its attention mask is what differs from padding."""
    model, processor = tiny_model()
    tokenizer = processor.tokenizer
    samples = [
        replace(tiny_samples()[-1], conversations=talk)
        for talk in (
            [{"from": "human", "value": "Hello?"}, {"from": "gpt", "value": "Hi."}],
            [{"from": "human", "value": "Which?"}, {"from": "gpt", "value": "The red, the green."}] * 2,
        )
    ]
    template = TEMPLATES["shellv"]
    examples = tokenize_samples(samples, tokenizer, processor.image_token_id, 4, 250, template=template)
    batch = make_batch(examples, np.array([0, 1]), None, processor.image_token_id, tokenizer.eos_token_id)
    ids, labels = (
        torch.from_numpy(ragged.values[ragged.offsets[1] :].astype(np.int64))[None]
        for ragged in (examples.input_ids, examples.labels)
    )
    assert (ids == tokenizer.eos_token_id).sum() == 5
    with torch.no_grad():
        alone = make_batch(examples, np.array([0]), None, processor.image_token_id, tokenizer.eos_token_id)
        both, short = (TrainingModel(model)(each).generation_loss_sum for each in (batch, alone))
        seen = torch.ones_like(ids)
        losses = [
            model(input_ids=ids, attention_mask=mask, labels=labels).loss * (labels != IGNORE_INDEX).sum()
            for mask in (seen, (ids != tokenizer.eos_token_id).long())
        ]
    torch.testing.assert_close(both - short, losses[0], rtol=1e-4, atol=1e-3)
    assert abs(losses[0] - losses[1]) > 0.01
