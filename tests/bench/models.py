"""Random models and packs of a size that shows what training costs, without weights or pictures to load."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from transformers import (
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Starcoder2Config,
)

from shellv_core.data.loader import NO_IMAGE, PackedBatch
from shellv_core.data.packing import document_layout
from shellv_core.models.hacl import HaclHeads
from shellv_core.training.config import HaclConfig
from shellv_core.training.model import TrainingModel

IMAGE_TOKEN, EOS_TOKEN, FIRST_TEXT_TOKEN = 3, 2, 4
VISION_WIDTH = 256
Step = Callable[[], object]


def random_module(
    hidden_size: int, layers: int, vocabulary: int, image_tokens: int, hacl: bool = True, positions: int = 4096
) -> TrainingModel:
    """A Starcoder2 Shell-V with heads of 64 and a quarter as many key heads; its vision tower is not meant to run."""
    text = Starcoder2Config(
        hidden_size=hidden_size,
        intermediate_size=4 * hidden_size,
        num_hidden_layers=layers,
        num_attention_heads=hidden_size // 64,
        num_key_value_heads=max(hidden_size // 256, 1),
        vocab_size=vocabulary,
        max_position_embeddings=positions,
        bos_token_id=EOS_TOKEN,
        eos_token_id=EOS_TOKEN,
        residual_dropout=0.0,
        embedding_dropout=0.0,
    )
    vision = CLIPVisionConfig(
        hidden_size=VISION_WIDTH, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4, image_size=28
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(
        LlavaConfig(
            vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN, image_seq_length=image_tokens
        )
    )
    model.generation_config = GenerationConfig(eos_token_id=EOS_TOKEN, pad_token_id=0)
    model.model.vision_tower.requires_grad_(False)
    return TrainingModel(model, HaclHeads(hidden_size) if hacl else None, HaclConfig(weight=1.0)).train()


def random_pack(
    texts: Sequence[int], has_image: Sequence[bool], image_tokens: int, vocabulary: int, labelled: float, seed: int = 0
) -> PackedBatch:
    """Documents with `texts` tokens each beside their image, which follows two of them.

    Args:
        labelled: share of the texts, at their ends, that is learned.
    """
    generator = np.random.default_rng(seed)
    ids, labels = [], []
    for length, image in zip(texts, has_image, strict=True):
        text = generator.integers(FIRST_TEXT_TOKEN, vocabulary, length)
        learned = np.where(np.arange(length) >= max(round(length * (1 - labelled)), 2), text, -100)
        if image:
            text = np.concatenate([text[:2], np.full(image_tokens, IMAGE_TOKEN), text[2:]])
            learned = np.concatenate([np.full(2 + image_tokens, -100), learned[2:]])
        ids.append(text)
        labels.append(learned)
    positions, borders = document_layout(np.asarray([len(each) for each in ids]))
    images = np.cumsum(has_image) - 1
    count = int(np.sum(has_image))
    return PackedBatch(
        input_ids=torch.from_numpy(np.concatenate(ids)),
        labels=torch.from_numpy(np.concatenate(labels)),
        position_ids=torch.from_numpy(positions),
        cu_seqlens=torch.from_numpy(borders),
        images=torch.zeros(count, 3, 0, 0, dtype=torch.uint8),
        image_index=torch.from_numpy(np.where(has_image, images, NO_IMAGE)),
        captions=(None,) * count,
        hallucinated=((),) * count,
        keys=tuple(map(str, range(len(ids)))),
        documents=torch.arange(len(ids)),
    )


def interleaved_seconds(steps: Mapping[str, Step], rounds: int) -> dict[str, float]:
    """Median CPU seconds of each step, all of them in every round, after a round that does not count.

    The process's own seconds (of all its threads), as others may be at work on the machine.
    """
    seconds: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            begun = time.process_time()
            step()
            seconds[name].append(time.process_time() - begun)
    return {name: float(np.median(each[1:])) for name, each in seconds.items()}
