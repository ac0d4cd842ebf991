"""The processor of a LLaVA model: what turns pictures and chat messages into its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from transformers import LlavaProcessor, PreTrainedTokenizerBase
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from shellv_core.templates import IMAGE_TOKEN, Template, add_template_tokens


@dataclass(frozen=True)
class ImageInput:
    """What a vision tower takes, and what of its tokens the language model gets.

    Attributes:
        size, patch_size: pixels of a side.
        mean, std: of pixel values in 0..1, three each.
        select_strategy: "full", or "default" without the class token.
        has_class_token: the tower puts a class token before the patches (CLIP).
        pad: pad a picture to a square with the mean color; else crop its center.
    """

    size: int
    patch_size: int
    mean: Sequence[float]
    std: Sequence[float]
    select_strategy: str
    has_class_token: bool
    pad: bool = True


def make_processor(tokenizer: PreTrainedTokenizerBase, template: Template, image: ImageInput) -> LlavaProcessor:
    """The processor with its chat template; `tokenizer` must have gone through `prepare_tokenizer`."""
    image_processor = LlavaImageProcessorPil(
        do_pad=image.pad,
        size={"shortest_edge": image.size},
        crop_size={"height": image.size, "width": image.size},
        image_mean=list(image.mean),
        image_std=list(image.std),
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=tokenizer,
        patch_size=image.patch_size,
        vision_feature_select_strategy=image.select_strategy,
        chat_template=template.bound(tokenizer).chat_template(),
        image_token=IMAGE_TOKEN,
        num_additional_image_tokens=int(image.has_class_token),
    )


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, template: Template) -> None:
    """Give `tokenizer`, in place, the template's tokens, a padding token and padding on the left."""
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.unk_token or tokenizer.eos_token
    add_template_tokens(tokenizer, template)
    tokenizer.padding_side = "left"


def stop_ids(tokenizer: PreTrainedTokenizerBase, template: Template) -> int | list[int]:
    """The ids that end an answer: the end-of-text token, and the template's end marker where that is one token."""
    eos: int = tokenizer.eos_token_id
    stops = [text for text in template.stop_strings if text in template.markers]
    ids: Any = tokenizer.convert_tokens_to_ids(stops)
    ends = [each for each in ids if each != eos]
    return [eos, *ends] if ends else eos
