"""Packs: rows of documents that together fill a fixed number of tokens, and the plan of an epoch in packs.

The plan is a pure function of its inputs, so a position in an epoch is one number, and the ranks of any world size find
their parts of a global batch without talking to each other.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from shellv_core.data.order import epoch_blocks, num_lanes, sample_counts, spread_documents
from shellv_core.errors import ConfigError, DataError

PLAN_VERSION = 1  # to be raised whenever equal inputs give another plan
MIN_WINDOW_DOCUMENTS = 64


@dataclass(frozen=True)
class Packs:
    """P packs of documents.

    Attributes:
        documents: int64 (D,), pack after pack.
        offsets: int64 (P + 1,): pack p holds documents[offsets[p]:offsets[p + 1]].
        windows: int64 (P,), rising: the window of documents in which the pack was made.
    """

    documents: np.ndarray
    offsets: np.ndarray
    windows: np.ndarray

    def __len__(self) -> int:
        return len(self.windows)


@dataclass(frozen=True)
class EpochPlan:
    """The packs of an epoch in the order of training.

    Step s trains on packs s * G to (s + 1) * G, fewer at the end; rank r of W takes every W-th of them, from the r-th.

    Attributes:
        documents, offsets: as in `Packs`.
        units: int64 (P,): packs of one unit come from the same blocks of samples and are best read together.
        global_batch: G, packs to a step.
    """

    documents: np.ndarray
    offsets: np.ndarray
    units: np.ndarray
    global_batch: int

    @property
    def num_packs(self) -> int:
        """P."""
        return len(self.units)

    @property
    def num_steps(self) -> int:
        """Steps of the epoch, the last incomplete one included."""
        return -(-self.num_packs // self.global_batch)

    def rank_packs(self, step: int, rank: int, world_size: int) -> range:
        """The packs of one rank in one step; in the last step there may be none."""
        end = min((step + 1) * self.global_batch, self.num_packs)
        return range(step * self.global_batch + rank, end, world_size)

    def pack(self, number: int) -> np.ndarray:
        """The documents of a pack."""
        return self.documents[self.offsets[number] : self.offsets[number + 1]]

    def sha256(self) -> str:
        """Hash of the plan, in hex."""
        digest = hashlib.sha256(f"{PLAN_VERSION} {self.global_batch}".encode())
        for array in (self.documents, self.offsets):
            digest.update(np.ascontiguousarray(array, dtype="<i8").tobytes())
        return digest.hexdigest()


def pack_windows(lengths: np.ndarray, capacity: int, bounds: Sequence[tuple[int, int]]) -> Packs:
    """Pack each window of documents by best-fit decreasing.

    The emptiest pack of a window is opened again and its documents join the next window, so that small windows fill
    their packs as well as large ones.

    Args:
        lengths: tokens of each document.
        capacity: tokens of a pack.
        bounds: windows (start, stop) that follow each other and cover all documents.

    Raises:
        DataError: if a document is longer than a pack.
    """
    check_lengths(lengths, capacity)
    packs: list[list[int]] = []
    windows: list[int] = []
    carried: list[int] = []
    for number, (start, stop) in enumerate(bounds):
        candidates = np.concatenate([np.asarray(carried, dtype=np.int64), np.arange(start, stop)])
        candidates = candidates[np.argsort(-lengths[candidates], kind="stable")]
        made, free = _best_fit(candidates.tolist(), lengths[candidates].tolist(), capacity)
        carried = []
        if made and number < len(bounds) - 1:
            carried = made.pop(max(range(len(free)), key=free.__getitem__))
        packs += made
        windows += [number] * len(made)
    offsets = np.zeros(len(packs) + 1, dtype=np.int64)
    np.cumsum([len(pack) for pack in packs], out=offsets[1:])
    documents = np.fromiter((document for pack in packs for document in pack), dtype=np.int64, count=int(offsets[-1]))
    return Packs(documents, offsets, np.asarray(windows, dtype=np.int64))


def check_lengths(lengths: np.ndarray, capacity: int) -> None:
    """Raise a DataError if a document has more tokens than `capacity`."""
    if (too_long := np.flatnonzero(lengths > capacity)).size:
        raise DataError(
            f"{len(too_long)} of {len(lengths)} documents are longer than a pack of {capacity} tokens; the first is"
            f" number {too_long[0]}, the longest has {lengths.max()} tokens. Raise max_length, or let the loader cut"
            " them or leave them out."
        )


def plan_epoch(
    document_offsets: Sequence[np.ndarray],
    lengths: np.ndarray,
    capacity: int,
    global_batch: int,
    seed: int,
    epoch: int,
    weights: Sequence[float] | None = None,
    samples_per_epoch: int | None = None,
) -> EpochPlan:
    """The plan of an epoch.

    Args:
        document_offsets: for each source int64 (samples + 1,), see `order.spread_documents`.
        lengths: tokens of every document of all sources.
        capacity: tokens of a pack.
        global_batch: packs to an optimizer step, of all ranks together.
        weights, samples_per_epoch: see `order.sample_counts`.

    Raises:
        DataError: if a document is longer than a pack, or there is none.
    """
    sizes = [len(offsets) - 1 for offsets in document_offsets]
    counts = sample_counts(sizes, weights, samples_per_epoch)
    if any(count and not size for size, count in zip(sizes, counts, strict=True)):
        raise ConfigError(f"a source without samples has a weight: sizes are {sizes}, weights {weights}.")
    blocks = epoch_blocks(sizes, counts, seed, epoch)
    expected = sum(
        int(offsets[-1] - offsets[0]) * count // max(size, 1)
        for offsets, size, count in zip(document_offsets, sizes, counts, strict=True)
    )
    order = spread_documents(blocks, document_offsets, num_lanes(expected, global_batch), seed, epoch)
    if not len(order.documents):
        raise DataError(f"there is nothing to train on: sources of {sizes} samples have no document.")
    generator = np.random.default_rng([seed, 3, epoch])
    parts = []
    for lane in range(int(order.lane[-1]) + 1):
        start, stop = np.searchsorted(order.lane, [lane, lane + 1])
        documents, unit = order.documents[start:stop], order.unit[start:stop]
        bounds = _window_bounds(unit, order.num_blocks)
        packs = pack_windows(lengths[documents], capacity, bounds)
        # Within a window, packs come in the order of their longest documents; that must not be the order of training.
        shuffled = np.lexsort((generator.random(len(packs)), packs.windows))
        unit_of_window = unit[[first for first, _ in bounds]] if bounds else unit
        parts.append((documents, packs, shuffled, unit_of_window))
    rank = np.concatenate([np.arange(len(packs)) for _, packs, _, _ in parts])
    lane_of_pack = np.repeat(np.arange(len(parts)), [len(packs) for _, packs, _, _ in parts])
    units = np.concatenate([of_window[packs.windows[shuffled]] for _, packs, shuffled, of_window in parts])
    pieces = [
        documents[packs.documents[packs.offsets[number] : packs.offsets[number + 1]]]
        for documents, packs, shuffled, _ in parts
        for number in shuffled
    ]
    # The lanes take turns; they end within a few steps of each other.
    final = np.lexsort((lane_of_pack, rank))
    offsets = np.zeros(len(pieces) + 1, dtype=np.int64)
    np.cumsum([len(pieces[number]) for number in final], out=offsets[1:])
    return EpochPlan(np.concatenate([pieces[number] for number in final]), offsets, units[final], global_batch)


def document_layout(lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Positions that begin at 0 in each document, int64 (tokens,), and the documents' borders, int32 (D + 1,).

    The borders (``cu_seqlens`` of varlen attention) begin with 0 and end with the number of tokens.
    """
    borders = np.zeros(len(lengths) + 1, dtype=np.int32)
    np.cumsum(lengths, out=borders[1:])
    return np.arange(borders[-1], dtype=np.int64) - np.repeat(borders[:-1], lengths), borders


def _best_fit(documents: list[int], lengths: list[int], capacity: int) -> tuple[list[list[int]], list[int]]:
    """Packs and the free tokens of each; documents come by falling length."""
    packs: list[list[int]] = []
    free: list[int] = []
    by_free: dict[int, list[int]] = {}
    sizes = 0  # bit n is set where a pack has n tokens free: the least that is enough is one shift away
    for document, length in zip(documents, lengths, strict=True):
        enough = sizes >> length
        if enough:
            found = length + (enough & -enough).bit_length() - 1
            number = by_free[found].pop()
            if not by_free[found]:
                sizes ^= 1 << found
            packs[number].append(document)
            left = found - length
            free[number] = left
        else:
            number = len(packs)
            packs.append([document])
            left = capacity - length
            free.append(left)
        if left:
            by_free.setdefault(left, []).append(number)
            sizes |= 1 << left
    return packs, free


def _window_bounds(unit: np.ndarray, num_blocks: np.ndarray) -> list[tuple[int, int]]:
    """Cut each unit into windows with about one document of each of its blocks."""
    bounds: list[tuple[int, int]] = []
    starts = np.flatnonzero(np.diff(unit, prepend=-1))
    for start, stop in zip(starts.tolist(), [*starts[1:].tolist(), len(unit)], strict=True):
        wanted = max(MIN_WINDOW_DOCUMENTS, int(num_blocks[unit[start]]))
        edges = np.linspace(start, stop, max(1, round((stop - start) / wanted)) + 1).astype(int).tolist()
        bounds += itertools.pairwise(edges)
    return bounds
