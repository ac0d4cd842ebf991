"""A random LLaVA model with a CLIP tower, small enough to answer in milliseconds."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

IMAGE_TOKEN, STOP_TOKEN = "<image>", "</s>"
WORDS = "USER : ASSISTANT yes no is there a dog cat car bus in the image ? describe this . ` , it on of"
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ 'USER: ' if message['role'] == 'user' else 'ASSISTANT: ' }}"
    "{% for part in message['content'] %}"
    "{{ '<image>\n' if part['type'] == 'image' else part['text'] }}"
    "{% endfor %}{{ ' ' if message['role'] == 'user' else '</s>' }}"
    "{% endfor %}"
    "{{ 'ASSISTANT:' if add_generation_prompt else '' }}"
)


def build_tiny_llava(seed: int = 0) -> tuple[Any, Any]:
    """Model and processor; 4 image tokens, two layers, word-level vocabulary."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import (
        CLIPImageProcessor,
        CLIPVisionConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaProcessor,
        PreTrainedTokenizerFast,
        Starcoder2Config,
    )

    torch.manual_seed(seed)
    vocabulary = {word: index for index, word in enumerate(["<pad>", "<unk>", STOP_TOKEN, IMAGE_TOKEN, *WORDS.split()])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        unk_token="<unk>",
        pad_token="<pad>",
        eos_token=STOP_TOKEN,
        additional_special_tokens=[IMAGE_TOKEN],
    )
    processor = LlavaProcessor(
        image_processor=CLIPImageProcessor(size={"height": 16, "width": 16}, crop_size={"height": 16, "width": 16}),
        tokenizer=tokenizer,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=16,
            patch_size=8,
            initializer_range=0.3,
        ),
        text_config=Starcoder2Config(
            vocab_size=len(vocabulary),
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            sliding_window=None,
            tie_word_embeddings=False,
            initializer_range=0.3,
            eos_token_id=vocabulary[STOP_TOKEN],
            pad_token_id=0,
            bos_token_id=None,
        ),
        image_token_index=vocabulary[IMAGE_TOKEN],
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    model.generation_config.eos_token_id = vocabulary[STOP_TOKEN]
    model.generation_config.pad_token_id = 0
    return model, processor


def save_tiny_llava(directory: Path, seed: int = 0) -> None:
    """Write the model directory."""
    model, processor = build_tiny_llava(seed)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)


def picture(seed: int, side: int = 24) -> bytes:
    """A PNG of one random color with a block of another."""
    import random

    from PIL import Image

    rng = random.Random(seed)
    image = Image.new("RGB", (side, side), tuple(rng.randrange(256) for _ in range(3)))
    image.paste(tuple(rng.randrange(256) for _ in range(3)), (4, 4, rng.randrange(8, 20), rng.randrange(8, 20)))
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
