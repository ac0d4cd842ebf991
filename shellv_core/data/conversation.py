"""Conversations as token ids with labels.

The text is LLaVA-1.5's (vicuna_v1 without a system prompt)::

    USER: <image>\\n{question} ASSISTANT: {answer}</s>USER: {question} ASSISTANT: {answer}</s>

the same that a model's chat template renders. The whole text is tokenized once; which tokens are labels follows from
the character spans of the answers, which are known when the text is put together.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shellv_core.data.samples import IMAGE_TOKEN
from shellv_core.errors import DataError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IGNORE_INDEX = -100
ROLES = ("human", "gpt")


@dataclass(frozen=True)
class RenderedConversation:
    """The text of a conversation, and the (start, end) characters of each answer with its end-of-text token."""

    text: str
    answer_spans: tuple[tuple[int, int], ...]


def render_conversation(conversations: Sequence[Mapping[str, str]], eos_token: str) -> RenderedConversation:
    """Render LLaVA turns (``{"from": "human" | "gpt", "value": str}``).

    As in LLaVA, the image comes first in its turn, wherever ``<image>`` stood.

    Raises:
        DataError: if the turns do not alternate from human to gpt, or an answer is empty.
    """
    parts: list[str] = []
    spans: list[tuple[int, int]] = []
    length = 0
    if not conversations or len(conversations) % 2:
        raise DataError(f"a conversation has {len(conversations)} turns; pairs of human and gpt turns are expected.")
    for index, turn in enumerate(conversations):
        role, value = turn["from"], turn["value"]
        if role != ROLES[index % 2]:
            raise DataError(f"turn {index} is from {role!r}; {ROLES[index % 2]!r} is expected, as roles alternate.")
        text = value.replace(IMAGE_TOKEN, "").strip()
        if role == "human":
            image = f"{IMAGE_TOKEN}\n" if IMAGE_TOKEN in value else ""
            part = f"USER: {image}{text} ASSISTANT:"
        else:
            if not text:
                raise DataError(f"turn {index}, an answer, is empty; leave the row out or give a text.")
            part = f" {text}{eos_token}"
            spans.append((length, length + len(part)))
        parts.append(part)
        length += len(part)
    return RenderedConversation("".join(parts), tuple(spans))


def encode_conversations(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Sequence[Mapping[str, str]]],
    image_token_id: int,
    num_image_tokens: int,
    max_length: int,
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Encode many conversations; each yields (input_ids, labels), int32 of shape (length,).

    The image token stands `num_image_tokens` times for each picture. Labels are the answers with their end-of-text
    token, -100 elsewhere (not shifted). Longer conversations are cut at `max_length` tokens.

    Raises:
        DataError: if a conversation cannot be rendered or has no label left within `max_length`.
    """
    rendered = [render_conversation(turns, str(tokenizer.eos_token)) for turns in conversations]
    if not rendered:
        return
    encoding = tokenizer([item.text for item in rendered], return_offsets_mapping=True, return_attention_mask=False)
    for item, ids, offsets in zip(rendered, encoding["input_ids"], encoding["offset_mapping"], strict=True):
        input_ids = np.asarray(ids, dtype=np.int32)
        ends = np.asarray(offsets, dtype=np.int64)[:, 1]
        in_answer = np.zeros(len(input_ids), dtype=bool)
        for start, end in item.answer_spans:
            in_answer |= (ends > start) & (ends <= end)
        labels = np.where(in_answer, input_ids, np.int32(IGNORE_INDEX))
        repeats = np.where(input_ids == image_token_id, num_image_tokens, 1)
        input_ids, labels = np.repeat(input_ids, repeats)[:max_length], np.repeat(labels, repeats)[:max_length]
        if not (labels != IGNORE_INDEX).any():
            raise DataError(
                f"a conversation of {int(repeats.sum())} tokens has no answer within max_length={max_length}:"
                f" {item.text[:80]!r}... Raise max_length or shorten the question."
            )
        yield input_ids, labels


def encode_conversation(
    tokenizer: PreTrainedTokenizerBase,
    conversations: Sequence[Mapping[str, str]],
    image_token_id: int,
    num_image_tokens: int,
    max_length: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Encode one conversation; see `encode_conversations`."""
    return next(encode_conversations(tokenizer, [conversations], image_token_id, num_image_tokens, max_length))


def encode_captions(tokenizer: PreTrainedTokenizerBase, captions: Sequence[str], max_length: int) -> list[np.ndarray]:
    """Encode captions for the contrastive objective: the text alone, then the end-of-text token.

    Returns int32 arrays of shape (length,), each ending with the end-of-text token even where a text was cut.
    """
    if not captions:
        return []
    texts = [caption.strip() for caption in captions]
    encoding = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    return [np.asarray([*ids[: max_length - 1], tokenizer.eos_token_id], dtype=np.int32) for ids in encoding]
