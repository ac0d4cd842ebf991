"""How many tokens every conversation of a split has: what packing needs to know before anything is read.

The figures come from the index where the data was prepared for the same tokenizer and template, else from one pass over
the data, which is kept below the project folder.
"""

from __future__ import annotations

import hashlib
import json
import os
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from shellv_core.data.encoder import ConversationEncoder
from shellv_core.data.index import index_num_tokens
from shellv_core.data.reader import SplitReader
from shellv_core.data.samples import Sample
from shellv_core.errors import DataError
from shellv_core.progress import Progress
from shellv_core.storage import home

IDENTITY_DETAIL = "num_tokens_identity"  # in the manifest's details: the encoder that the index's num_tokens are of
SAMPLES_AT_ONCE = 1024


@dataclass(frozen=True)
class ConversationLengths:
    """Conversations of N samples.

    Attributes:
        offsets: int64 (N + 1,): sample i has conversations offsets[i] to offsets[i + 1].
        num_tokens: int64, of each conversation, an image counting as one.
        has_image: bool, of each conversation.
    """

    offsets: np.ndarray
    num_tokens: np.ndarray
    has_image: np.ndarray

    def with_images(self, num_image_tokens: int) -> np.ndarray:
        """Tokens of each conversation, an image counting as `num_image_tokens`."""
        return self.num_tokens + self.has_image * (num_image_tokens - 1)


def conversation_lengths(reader: SplitReader, encoder: ConversationEncoder) -> ConversationLengths:
    """The lengths of all conversations of a split.

    Raises:
        DataError: naming the sample, if one cannot be encoded.
    """
    if encoder.tasks is None and reader.source.manifest.details.get(IDENTITY_DETAIL) == encoder.identity:
        counts, num_tokens = index_num_tokens(reader.index_path)
    else:
        path = _cache_path(reader, encoder)
        cached = _read_cache(path)
        if cached is None:
            cached = _count(reader, encoder)
            _write_cache(path, *cached)
        counts, num_tokens = cached
    if len(counts) != len(reader):
        raise DataError(
            f"lengths of {len(counts)} samples are known, {reader.source.uri} has {len(reader)}; delete"
            f" {home() / 'cache' / 'lengths'} and rerun."
        )
    offsets = np.zeros(len(counts) + 1, dtype=np.int64)
    np.cumsum(counts, out=offsets[1:])
    has_image = np.repeat(reader.index.image_size > 0, counts)
    return ConversationLengths(offsets, num_tokens.astype(np.int64), has_image)


def image_token_fault(
    input_ids: np.ndarray, encoder: ConversationEncoder, sample: Sample, num_image_tokens: int
) -> str | None:
    """What is wrong with the image tokens of one of a sample's conversations; None for nothing."""
    count = int((input_ids == encoder.image_token_id).sum())
    expected = 0 if sample.image is None else num_image_tokens
    if count == expected:
        return None
    return (
        f"a conversation holds {count} image tokens, {expected} are expected: it must name its one image once, and a"
        " conversation without an image must not."
    )


def _count(reader: SplitReader, encoder: ConversationEncoder) -> tuple[np.ndarray, np.ndarray]:
    counts: list[int] = []
    num_tokens: list[int] = []
    with Progress(len(reader), "counting tokens", "samples") as counter:
        for chunk in _chunks(reader.samples()):
            conversations = [encoder.conversations(sample) for sample in chunk]
            try:
                encoded = encoder([one for each in conversations for one in each], 1)
            except DataError:
                # Again one by one, to name the sample.
                for position, each in enumerate(conversations, start=len(counts)):
                    try:
                        encoder(each, 1)
                    except DataError as error:
                        raise DataError(f"{reader.address(position)}: {error}") from None
                raise
            remaining = iter(encoded)
            for sample, each in zip(chunk, conversations, strict=True):
                for input_ids, _ in islice(remaining, len(each)):
                    if fault := image_token_fault(input_ids, encoder, sample, 1):
                        raise DataError(f"{reader.address(len(counts))}: {fault}")
                    num_tokens.append(len(input_ids))
                counts.append(len(each))
            counter.update(len(chunk))
    return np.asarray(counts, dtype=np.int64), np.asarray(num_tokens, dtype=np.int32)


def _chunks(samples: Iterator[Sample]) -> Iterator[list[Sample]]:
    while chunk := list(islice(samples, SAMPLES_AT_ONCE)):
        yield chunk


def _cache_path(reader: SplitReader, encoder: ConversationEncoder) -> Path:
    what = [reader.source.content_sha256, reader.split, encoder.identity, encoder.tasks]
    return home() / "cache" / "lengths" / f"{hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]}.npz"


def _read_cache(path: Path) -> tuple[np.ndarray, np.ndarray] | None:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return arrays["counts"], arrays["num_tokens"]
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
        return None


def _write_cache(path: Path, counts: np.ndarray, num_tokens: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    with unfinished.open("wb") as file:
        np.savez(file, counts=counts, num_tokens=num_tokens)
    unfinished.replace(path)
