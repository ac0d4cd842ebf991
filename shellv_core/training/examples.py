"""Training examples as flat arrays: tokenized once, then cut into batches without work per sample in Python."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from shellv_core.data.conversation import IGNORE_INDEX, encode_captions, encode_conversations
from shellv_core.data.samples import (
    HALLUCINATION_TYPES,
    IMAGE_TOKEN,
    Conversation,
    HallucinatedCaption,
    Sample,
    sample_conversations,
)
from shellv_core.errors import DataError
from shellv_core.templates import DEFAULT_TEMPLATE, TEMPLATES, Template

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_IMAGE = -1
TOKENIZE_AT_ONCE = 2048
MAX_CAPTION_LENGTH = 128
TYPES = (*HALLUCINATION_TYPES, "unspecified")


@dataclass(frozen=True)
class Ragged:
    """Sequences of different lengths in one array: sequence i is ``values[offsets[i]:offsets[i + 1]]``."""

    values: np.ndarray
    offsets: np.ndarray

    @classmethod
    def of(cls, sequences: Sequence[np.ndarray]) -> Ragged:
        """Join int32 sequences."""
        offsets = np.zeros(len(sequences) + 1, dtype=np.int64)
        np.cumsum([len(sequence) for sequence in sequences], out=offsets[1:])
        values = np.concatenate(sequences) if sequences else np.zeros(0, dtype=np.int32)
        return cls(values, offsets)

    @property
    def lengths(self) -> np.ndarray:
        """Length of each sequence."""
        return np.diff(self.offsets)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def at(self, index: int) -> np.ndarray:
        """Sequence `index`."""
        return self.values[self.offsets[index] : self.offsets[index + 1]]

    def padded(self, indices: np.ndarray, fill: int) -> np.ndarray:
        """The sequences `indices`, right-padded with `fill`: int64 of shape (len(indices), longest)."""
        starts, lengths = self.offsets[indices], self.lengths[indices]
        columns = np.arange(lengths.max(initial=0))
        inside = columns[None, :] < lengths[:, None]
        positions = np.where(inside, starts[:, None] + columns[None, :], 0)
        return np.where(inside, self.values[positions] if len(self.values) else 0, fill).astype(np.int64)


@dataclass(frozen=True)
class Answers:
    """Captions, hallucinated captions and their truths as answers to one prompt about an image.

    Attributes:
        prompt_ids: the conversation before the answer, image tokens included.
        captions, hallucinated, truths: what is learned behind it, in the order of `Examples`; empty for no text.
    """

    prompt_ids: np.ndarray
    captions: Ragged
    hallucinated: Ragged
    truths: Ragged


@dataclass(frozen=True)
class Examples:
    """N conversations about M images.

    Attributes:
        input_ids, labels: N sequences of equal lengths; labels are -100 where nothing is learned.
        image_index: (N,) index of the conversation's image, -1 for text only.
        captions: M sequences, empty where an image has no caption.
        hallucinated: the hallucinated captions of all images; image m has those from hallucinated_offsets[m] to
            hallucinated_offsets[m + 1].
        hallucinated_types: index of each one's type in `TYPES`.
        truths: their own truths, empty where that is the image's caption.
        caption_groups, hallucinated_groups, truth_groups: hashes of the texts, equal for equal texts.
        answers: the same texts as answers to a prompt; None if not asked for.
    """

    input_ids: Ragged
    labels: Ragged
    image_index: np.ndarray
    captions: Ragged
    caption_groups: np.ndarray
    hallucinated: Ragged
    hallucinated_groups: np.ndarray
    hallucinated_offsets: np.ndarray
    hallucinated_types: np.ndarray
    truths: Ragged
    truth_groups: np.ndarray
    answers: Answers | None = None

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def num_images(self) -> int:
        """Number of images, each counted once."""
        return len(self.captions)


def image_bytes(samples: Iterable[Sample]) -> Iterator[bytes]:
    """The encoded images of `samples`, in the order that `tokenize_samples` numbers them."""
    for sample in samples:
        if sample.image is not None:
            yield sample.image


def tokenize_samples(
    samples: Iterable[Sample],
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    num_image_tokens: int,
    max_length: int,
    tasks: Sequence[str] | None = None,
    on_sample: Callable[[], None] = lambda: None,
    template: Template = TEMPLATES[DEFAULT_TEMPLATE],
    prompt: str | None = None,
) -> Examples:
    """Tokenize every conversation and caption of `samples`; images are numbered in their order.

    Args:
        samples: read once; their images are not kept.
        on_sample: called after each sample, for progress.
        template: the model's (`template_of` its processor).
        prompt: encode the captions as answers to it as well.

    Raises:
        DataError: if there is no conversation, one cannot be encoded, or image and image token do not go together.
    """
    conversations: list[Conversation] = []
    image_index: list[int] = []
    captions: list[str] = []
    hallucinated: list[HallucinatedCaption] = []
    hallucinated_offsets = [0]
    for sample in samples:
        image = NO_IMAGE if sample.image is None else len(captions)
        for conversation in sample_conversations(sample, tasks):
            conversations.append(conversation)
            image_index.append(image)
        if sample.image is not None:
            captions.append((sample.caption or "").strip())
            hallucinated += [item for item in sample.hallucinated_captions if captions[-1]]
            hallucinated_offsets.append(len(hallucinated))
        on_sample()
    if not conversations:
        of_tasks = "" if tasks is None else f" of the tasks {', '.join(tasks)}"
        raise DataError(f"there is no conversation{of_tasks} to train on; look at the training split and at tasks.")

    input_ids: list[np.ndarray] = []
    labels: list[np.ndarray] = []
    for start in range(0, len(conversations), TOKENIZE_AT_ONCE):
        chunk = conversations[start : start + TOKENIZE_AT_ONCE]
        for ids, targets in encode_conversations(
            tokenizer, chunk, image_token_id, num_image_tokens, max_length, template
        ):
            _check_image_tokens(ids, image_token_id, num_image_tokens, image_index[len(input_ids)], len(input_ids))
            input_ids.append(ids)
            labels.append(targets)
    lies, truths = [item.text for item in hallucinated], [item.truth for item in hallucinated]
    answers = None
    if prompt is not None:
        answers = encode_answers(
            (captions, lies, truths), prompt, tokenizer, image_token_id, num_image_tokens, max_length, template
        )
    return Examples(
        Ragged.of(input_ids),
        Ragged.of(labels),
        np.asarray(image_index, dtype=np.int64),
        Ragged.of(encode_texts(tokenizer, captions)),
        text_groups(captions),
        Ragged.of(encode_texts(tokenizer, lies)),
        text_groups(lies),
        np.asarray(hallucinated_offsets, dtype=np.int64),
        np.asarray([TYPES.index(item.type) for item in hallucinated], dtype=np.int64),
        Ragged.of(encode_texts(tokenizer, truths)),
        text_groups(truths),
        answers,
    )


def encode_answers(
    kinds: Sequence[Sequence[str]],
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    image_token_id: int,
    num_image_tokens: int,
    max_length: int,
    template: Template,
) -> Answers:
    """Encode texts as answers to `prompt` about an image; what stands before them is the same for all, so kept once.

    Args:
        kinds: captions, hallucinated captions, their truths; empty texts have no answer.
    """
    empty = np.zeros(0, dtype=np.int32)
    prompt_ids, encoded = empty, []
    for texts in kinds:
        told = [text.strip() for text in texts if text.strip()]
        tails = []
        for start in range(0, len(told), TOKENIZE_AT_ONCE):
            talks = [
                [{"from": "human", "value": f"{IMAGE_TOKEN}\n{prompt}"}, {"from": "gpt", "value": text}]
                for text in told[start : start + TOKENIZE_AT_ONCE]
            ]
            for ids, labels in encode_conversations(
                tokenizer, talks, image_token_id, num_image_tokens, max_length, template
            ):
                learned = np.flatnonzero(labels != IGNORE_INDEX)
                prompt_ids = ids[: learned[0]]
                tails.append(ids[learned])
        remaining = iter(tails)
        encoded.append(Ragged.of([next(remaining) if text.strip() else empty for text in texts]))
    return Answers(prompt_ids, *encoded)


def _check_image_tokens(ids: np.ndarray, image_token_id: int, num_image_tokens: int, image: int, row: int) -> None:
    count = int((ids == image_token_id).sum())
    expected = 0 if image == NO_IMAGE else num_image_tokens
    if count != expected:
        raise DataError(
            f"conversation {row} holds {count} image tokens, {expected} are expected: it must name its one image once,"
            " in its first turn, and a conversation without an image must not."
        )


def encode_texts(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> list[np.ndarray]:
    """Ids of captions, int32, ending in the end-of-text token; none at all for an empty text."""
    encoded = encode_captions(tokenizer, texts, MAX_CAPTION_LENGTH)
    empty = np.zeros(0, dtype=np.int32)
    return [ids if text.strip() else empty for text, ids in zip(texts, encoded, strict=True)]


def text_groups(texts: Sequence[str]) -> np.ndarray:
    """Hashes, int64 (len(texts),), equal for equal texts."""
    return np.asarray([zlib.crc32(text.strip().encode()) for text in texts], dtype=np.int64)
