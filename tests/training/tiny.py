"""Tiny samples and models: made in memory in milliseconds."""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np
from PIL import Image

from shellv_core.data.samples import HallucinatedCaption, Sample
from shellv_core.models.compose import build_model
from shellv_core.models.config import LanguageModelConfig, ModelConfig, TokenizerConfig, VisionTowerConfig
from shellv_core.training.fit import tokenizer_texts

COLORS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220)}
EFFICIENTNET = VisionTowerConfig(pretrained=None, image_size=64, standardize=False)
CLIP = VisionTowerConfig(
    kind="clip",
    pretrained=None,
    standardize=False,
    image_size=28,
    feature_layer=-2,
    select_strategy="default",
    options={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "patch_size": 14,
    },
)
LANGUAGE_MODEL = LanguageModelConfig(
    options={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        # Large enough that an untrained model's logits differ from token to token.
        "initializer_range": 0.15,
    }
)


def tiny_model_config(vision_tower=EFFICIENTNET, language_model=LANGUAGE_MODEL):
    return ModelConfig(
        vision_tower=vision_tower, language_model=language_model, tokenizer=TokenizerConfig(vocab_size=400)
    )


def tiny_model(vision_tower=EFFICIENTNET, language_model=LANGUAGE_MODEL, samples: Sequence[Sample] | None = None):
    texts = list(tokenizer_texts(tiny_samples() if samples is None else samples))
    return build_model(tiny_model_config(vision_tower, language_model), texts, seed=0)


def picture(color, size=(40, 30), form="PNG"):
    pixels = np.random.default_rng(sum(color)).integers(0, 60, (size[1], size[0], 3)) + np.asarray(color) // 2
    buffer = io.BytesIO()
    Image.fromarray(pixels.astype(np.uint8)).save(buffer, form)
    return buffer.getvalue()


def tiny_samples(count=8, with_text_only=True):
    samples = []
    names = list(COLORS)
    for index in range(count):
        name, other = names[index % 3], names[(index + 1) % 3]
        samples.append(
            Sample(
                key=f"s{index:03d}",
                id=str(index),
                image=picture(COLORS[name], size=(30 + index, 40)),
                image_format="png",
                conversations=[
                    {"from": "human", "value": "<image>\nWhich color is it?"},
                    {"from": "gpt", "value": f"It is {name}."},
                    {"from": "human", "value": f"Is it {other}?"},
                    {"from": "gpt", "value": "No"},
                ],
                more_conversations=(
                    [
                        {"from": "human", "value": f"<image>\nPicture {index}: describe it."},
                        {"from": "gpt", "value": f"A {name} picture with number {index}."},
                    ],
                ),
                caption=f"A {name} picture with number {index}." if index != 4 else None,
                hallucinated_captions=tuple(
                    HallucinatedCaption(type=kind, text=f"A {other} picture with {kind} {index}.")
                    for kind in ("object", "attribute")[: 2 - index % 2]
                ),
                source="test",
            )
        )
    if with_text_only:
        samples.append(
            Sample(
                key="text",
                id="text",
                conversations=[{"from": "human", "value": "Say hello."}, {"from": "gpt", "value": "Hello."}],
                source="test",
            )
        )
    return samples
