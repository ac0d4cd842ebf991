"""A random LLaVA model with a CLIP tower and a byte-level tokenizer, and pictures to show to it."""

from __future__ import annotations

import base64
import io
from typing import Any

WORDS = [
    "a",
    "cat",
    "dog",
    "sits",
    "on",
    "the",
    "red",
    "blue",
    "table",
    "what",
    "is",
    "in",
    "this",
    "picture",
    "two",
    "three",
    "apples",
    "?",
    ".",
    ",",
    "hello",
    "world",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{% if message['role'] == 'user' %}USER: {% else %}ASSISTANT: {% endif %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>\n{% else %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% if message['role'] == 'user' %} {% else %}</s>{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)


def build_processor() -> Any:
    """A byte-level tokenizer, CLIP preprocessing at 32 pixels and a LLaVA-like chat template."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import CLIPImageProcessor, LlavaProcessor, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", "<image>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 3 + ["USER: ASSISTANT:"] * 3, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=["<image>"],
    )
    return LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}),
        fast,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT_TEMPLATE,
        image_token="<image>",
    )


def build_model(processor: Any, context_length: int = 512, backbone: str = "llama", width: int = 32) -> Any:
    """A random LLaVA model, with weights large enough that its answers vary.

    In a ``starcoder2`` two heads share their keys and values. Layers of less than 64 cannot be in 4 bits.
    """
    import torch
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        Starcoder2Config,
    )

    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    sizes: dict[str, Any] = {"hidden_size": width, "intermediate_size": 2 * width, "num_hidden_layers": 2}
    text_class, key_value_heads = {"llama": (LlamaConfig, 2), "starcoder2": (Starcoder2Config, 1)}[backbone]
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(**sizes, num_attention_heads=2, image_size=32, patch_size=8),
        text_config=text_class(
            **sizes,
            num_attention_heads=2,
            num_key_value_heads=key_value_heads,
            vocab_size=len(tokenizer),
            max_position_embeddings=context_length,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            initializer_range=0.3,
            tie_word_embeddings=False,
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )
    model = LlavaForConditionalGeneration(config).eval()
    # Never ends by itself, so that the length of every answer is known.
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    return model


def picture(color: str = "red", size: tuple[int, int] = (48, 40), format: str = "PNG", **options: Any) -> bytes:
    from PIL import Image

    buffer = io.BytesIO()
    Image.new("RGB", size, color).save(buffer, format, **options)
    return buffer.getvalue()


def data_url(data: bytes, mime: str = "image/png") -> str:
    return f"data:{mime};base64,{base64.b64encode(data).decode()}"
