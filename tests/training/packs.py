"""Packs without shards, and the plain computation that the packed one must equal: padded passes, one after another."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np
import torch
from torch.nn import functional

from shellv_core.data.loader import NO_IMAGE, PackedBatch
from shellv_core.data.packing import document_layout
from shellv_core.data.samples import HallucinatedCaption, Sample
from shellv_core.training.examples import Examples
from shellv_core.training.losses.hacl import ContrastFeatures, contrastive_loss

IMAGE_SIZE = 28
WORDS = ["a red bus", "the dog runs", "two cats", "a street and the sky", "blue", "he holds a lamp", "no one is there"]


def random_pack(
    image_token_id: int,
    num_image_tokens: int,
    vocab_size: int,
    lengths=((9, True), (5, False), (16, True), (12, True), (7, False)),
    prefix: int = 2,
    shared: bool = True,
    seed: int = 0,
) -> PackedBatch:
    """Documents of random ids: (tokens of text, whether about an image); the last with an image shares the first's.

    Args:
        prefix: tokens before the image.
    """
    generator = np.random.default_rng(seed)
    ids, labels, image_index = [], [], []
    with_image = [has for _, has in lengths]
    num_images = sum(with_image) - int(shared)
    for length, has_image in lengths:
        text = generator.integers(4, vocab_size, length)
        text[text == image_token_id] = 4
        learned = np.where(np.arange(length) >= max(length // 2, 1), text, -100)
        if has_image:
            image = np.full(num_image_tokens, image_token_id)
            text = np.concatenate([text[:prefix], image, text[prefix:]])
            learned = np.concatenate([np.full(prefix + num_image_tokens, -100), learned[prefix:]])
        number = sum(index != NO_IMAGE for index in image_index)
        image_index.append(number % num_images if has_image else NO_IMAGE)
        ids.append(text)
        labels.append(learned)
    position_ids, borders = document_layout(np.asarray([len(each) for each in ids]))
    captions = [WORDS[(number + seed) % len(WORDS)] for number in range(num_images)]
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(ids)),
        labels=torch.from_numpy(np.concatenate(labels)),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(borders),
        images=torch.from_numpy(generator.integers(0, 256, (num_images, 3, IMAGE_SIZE, IMAGE_SIZE)).astype(np.uint8)),
        image_index=torch.tensor(image_index),
        captions=tuple(captions),
        hallucinated=tuple(
            tuple(
                HallucinatedCaption(
                    "object",
                    f"{caption} and {WORDS[(number + slot + 3) % len(WORDS)]}",
                    truth=f"{caption} there" if number == slot == 0 else "",
                )
                for slot in range(2 - number % 2)
            )
            for number, caption in enumerate(captions)
        ),
        keys=tuple(f"d{number}" for number in range(len(ids))),
        documents=torch.arange(len(ids)),
    )


def pack_of(samples: Sequence[Sample], examples: Examples) -> PackedBatch:
    """All conversations of `samples`, tokenized as `examples`, as one pack; its pictures are empty."""
    rows = range(len(examples))
    position_ids, borders = document_layout(examples.input_ids.lengths)
    shown = [sample for sample in samples if sample.image is not None]
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate([examples.input_ids.at(row) for row in rows]).astype(np.int64)),
        labels=torch.from_numpy(np.concatenate([examples.labels.at(row) for row in rows]).astype(np.int64)),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(borders),
        images=torch.zeros(len(shown), 3, 0, 0, dtype=torch.uint8),
        image_index=torch.from_numpy(examples.image_index),
        captions=tuple(sample.caption for sample in shown),
        hallucinated=tuple(tuple(sample.hallucinated_captions) for sample in shown),
        keys=tuple(map(str, rows)),
        documents=torch.arange(len(rows)),
    )


def padded_passes(module, pack, features, contrast=None):
    """Sum of the generation loss, and the contrast: documents, images with readout, captions, hallucinated captions."""
    model = module.model
    embed, head = model.get_input_embeddings(), model.lm_head
    image_token_id = model.config.image_token_id

    def language_model(sequences):
        """Last hidden states of sequences of embeddings, padded to one length."""
        rows = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True, padding_value=0.5)
        return model.model.language_model(inputs_embeds=rows, use_cache=False).last_hidden_state

    images = None if features is None else model.model.multi_modal_projector(features)
    documents, ids, labels = [], [], []
    for number, (start, stop) in enumerate(itertools.pairwise(pack.cu_seqlens.tolist())):
        ids.append(pack.input_ids[start:stop])
        labels.append(pack.labels[start:stop])
        embeddings = embed(ids[-1])
        image = int(pack.image_index[number])
        if image != NO_IMAGE:
            embeddings = embeddings.clone()
            embeddings[ids[-1] == image_token_id] = images[image]
        documents.append(embeddings)
    hidden = language_model(documents)
    losses = [
        functional.cross_entropy(
            head(row[: len(label) - 1][label[1:] != -100]), label[1:][label[1:] != -100], reduction="sum"
        )
        for row, label in zip(hidden, labels, strict=True)
    ]
    if contrast is None:
        return torch.stack(losses).sum(), None
    eos = embed(torch.tensor([module.eos_token_id]))
    prefixes = []
    for image in contrast.images.tolist():
        number = pack.image_index.tolist().index(image)
        end = int((ids[number] == image_token_id).nonzero()[-1]) + 1
        prefixes.append(torch.cat([documents[number][:end], eos]))
    ends = [len(prefix) - 1 for prefix in prefixes]
    readouts = language_model(prefixes)[range(len(ends)), ends]
    num_images = len(ends)
    states = []
    for rows in (slice(0, num_images), slice(num_images, None)):
        texts = [
            embed(text[: end + 1]) for text, end in zip(contrast.text_ids[rows], contrast.text_ends[rows], strict=True)
        ]
        if texts:
            hidden = language_model(texts)
            states.append(hidden[range(len(texts)), [len(text) - 1 for text in texts]])
    texts = module.heads.embed_texts(torch.cat(states))
    slots, width = contrast.hallucinated_valid.shape[1], texts.shape[-1]
    lies_end = num_images * (1 + slots)
    truth = None
    if len(contrast.truth_slots):
        truth = texts.new_zeros(num_images * slots, width)
        truth = truth.index_copy(0, contrast.truth_slots, texts[lies_end:]).view(num_images, slots, width)
    features = ContrastFeatures.of(
        module.heads.embed_images(readouts),
        texts[:num_images],
        texts[num_images:lies_end].view(num_images, slots, width),
        hallucinated_valid=contrast.hallucinated_valid,
        caption_group=contrast.caption_groups,
        hallucinated_group=contrast.hallucinated_groups,
        hallucinated_type=contrast.hallucinated_types,
        truth=truth,
        truth_valid=contrast.truth_valid,
        truth_group=contrast.truth_groups,
    )
    result = contrastive_loss(features, module.heads.temperature, module.hacl.negatives)
    return torch.stack(losses).sum(), result
