"""The largest batch or pack of a run, without data."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from shellv_core.data.loader import NO_IMAGE, PackedBatch
from shellv_core.data.packing import document_layout
from shellv_core.training.batches import Batch, batch_images, make_batch
from shellv_core.training.config import TrainingConfig
from shellv_core.training.examples import Answers, Examples, Ragged
from shellv_core.training.model import TrainingModel
from shellv_core.training.packed import PackedRow, make_row
from shellv_core.training.packed_feed import pack_sizes
from shellv_core.training.pairs import make_contrast, make_preference

#: Without data to look at: text tokens of a conversation in a pack, tokens of a caption.
TEXT_TOKENS, CAPTION_TOKENS = 256, 32


def largest_batch(
    module: TrainingModel,
    config: TrainingConfig,
    examples: Examples | None = None,
    pack: tuple[int, int] | None = None,
    num_devices: int = 1,
) -> Batch | PackedRow:
    """The largest batch or pack that a device gets in a forward pass, without data.

    Args:
        examples: what is trained on in padded batches; without it, conversations of `config.max_length` with a picture
            each.
        pack: with packing, tokens of the largest pack and pictures in it; without it, as conversations usually have.
        num_devices: that share a step.
    """
    model = module.model
    image_tokens = int(model.config.image_seq_length)
    if config.packing:
        if pack is None:
            length = min(config.max_length, image_tokens + TEXT_TOKENS)
            tokens, _ = pack_sizes(np.full(config.global_batch_size, length), config)
            pack = tokens, max(tokens // length, 1)
        tokens, number = pack[0], max(pack[1], 1)
        examples = imagined_examples(module, [tokens // number] * number)
        return _imagined_pack(module, config, examples)
    rows = config.micro_batch_size or -(-config.global_batch_size // num_devices)
    if examples is None:
        examples = imagined_examples(module, [config.max_length] * rows)
    longest = np.argsort(-examples.input_ids.lengths, kind="stable")[:rows]
    count = len(batch_images(examples, longest))
    features = None
    if count:
        shape = (count, image_tokens, _tower_width(model))
        features = torch.empty(shape, dtype=_feature_dtype(module, config), device="meta")
    return make_batch(
        examples,
        longest,
        features,
        model.config.image_token_id,
        model.generation_config.pad_token_id or 0,
        num_hallucinated=module.hacl.num_hallucinated if module.heads is not None else None,
        truths=module.hacl.truth_weight > 0,
        preference=module.preference.weight > 0,
        loss_chunk=config.loss_chunk,
    )


def imagined_examples(module: TrainingModel, lengths: Sequence[int]) -> Examples:
    """Conversations of these lengths, each with a picture of its own, a caption and hallucinated captions."""
    model = module.model
    image_token, image_tokens = model.config.image_token_id, model.config.image_seq_length
    word = int(image_token == 0)
    input_ids, labels = [], []
    for length in lengths:
        ids = np.full(max(length, image_tokens + 2), word, dtype=np.int32)
        ids[1 : 1 + image_tokens] = image_token
        input_ids.append(ids)
        labels.append(np.where(np.arange(len(ids)) > image_tokens, ids, -100).astype(np.int32))
    count, slots = len(lengths), max(module.hacl.num_hallucinated, int(module.preference.weight > 0))
    texts = Ragged.of([np.full(CAPTION_TOKENS, word, dtype=np.int32)] * count)
    lies = Ragged.of([np.full(CAPTION_TOKENS, word, dtype=np.int32)] * count * slots)
    nothing = Ragged.of([np.zeros(0, dtype=np.int32)] * count * slots)
    prompt = np.full(image_tokens + CAPTION_TOKENS, word, dtype=np.int32)
    prompt[1 : 1 + image_tokens] = image_token
    number = np.arange(count)
    return Examples(
        input_ids=Ragged.of(input_ids),
        labels=Ragged.of(labels),
        image_index=number,
        captions=texts,
        caption_groups=number,
        hallucinated=lies,
        hallucinated_groups=count + np.arange(count * slots),
        hallucinated_offsets=np.arange(count + 1) * slots,
        hallucinated_types=np.zeros(count * slots, dtype=np.int64),
        truths=nothing,
        truth_groups=np.zeros(count * slots, dtype=np.int64),
        answers=Answers(prompt, texts, lies, nothing) if module.preference.weight else None,
    )


def _imagined_pack(module: TrainingModel, config: TrainingConfig, examples: Examples) -> PackedRow:
    """A pack of all `examples`."""
    model, lengths = module.model, examples.input_ids.lengths
    order = range(len(examples))
    position_ids, borders = document_layout(lengths)
    ids = np.concatenate([examples.input_ids.at(each) for each in order]).astype(np.int64)
    labels = np.concatenate([examples.labels.at(each) for each in order]).astype(np.int64)
    with_image = examples.image_index != NO_IMAGE
    count = int(with_image.sum())
    pack = PackedBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(borders),
        images=torch.zeros(count, 3, 0, 0, dtype=torch.uint8),
        image_index=torch.from_numpy(np.where(with_image, np.cumsum(with_image) - 1, NO_IMAGE)),
        captions=(None,) * count,
        hallucinated=((),) * count,
        keys=tuple(map(str, order)),
        documents=torch.arange(len(order)),
    )
    contrast = preference = None
    images = examples.image_index[with_image]
    if module.preference.weight and count:
        preference = make_preference(examples, images, model.config.image_token_id, 0, 0)
    if module.heads is not None and count:
        contrast = make_contrast(examples, images, 0, module.hacl.num_hallucinated, 0, module.hacl.truth_weight > 0)
    features = None
    if count:
        shape = (count, model.config.image_seq_length, _tower_width(model))
        features = torch.empty(shape, dtype=_feature_dtype(module, config), device="meta")
    return make_row(
        pack,
        features,
        model.config.image_token_id,
        module.eos_token_id or 0,
        contrast,
        config.loss_chunk,
        preference=preference,
    )


def _feature_dtype(module: TrainingModel, config: TrainingConfig) -> torch.dtype:
    if config.packing or not config.cache_features:
        return next(module.model.model.vision_tower.parameters()).dtype
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def _tower_width(model: Any) -> int:
    return int(model.model.multi_modal_projector.linear_1.in_features)
