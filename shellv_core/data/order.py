"""The order of an epoch, as a pure function of seed, epoch and sizes.

Samples that lie side by side are cheap to read together and bad to train on together. So an epoch shuffles small blocks
of neighbours, deals them to lanes, and in each lane holds a window of blocks at a time, whose documents it spreads so
that those of one block lie as far apart as they can. A lane always feeds the same place in the global batch, so the
ranks that share a batch read different blocks. Only the blocks of the open windows must be in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BLOCK_SAMPLES = 16
NUM_LANES = 16  # at least, where there are documents enough
WINDOW_DOCUMENTS = 1024  # of one lane


@dataclass(frozen=True)
class Blocks:
    """B runs of neighbouring samples: samples `start` to `stop` of source `source`, each int64 (B,)."""

    source: np.ndarray
    start: np.ndarray
    stop: np.ndarray

    def __len__(self) -> int:
        return len(self.source)


@dataclass(frozen=True)
class DocumentOrder:
    """D documents in the order in which a lane meets them, lane after lane.

    Attributes:
        documents: int64 (D,), numbered through all sources.
        lane: int64 (D,).
        unit: int64 (D,), rising: which window of blocks the document is in; numbered through all lanes.
        num_blocks: int64, blocks of each unit.
    """

    documents: np.ndarray
    lane: np.ndarray
    unit: np.ndarray
    num_blocks: np.ndarray


def sample_counts(sizes: Sequence[int], weights: Sequence[float] | None, total: int | None = None) -> list[int]:
    """How many samples of each source an epoch has.

    Args:
        sizes: samples of each source.
        weights: the sources' shares of an epoch, in any unit; None for their sizes.
        total: samples of an epoch; by default as many as the sources have.

    Returns:
        counts that add up to `total`, each within 1 of its share.
    """
    total = sum(sizes) if total is None else total
    weights = sizes if weights is None else weights
    shares = np.asarray(weights, dtype=np.float64) / np.sum(weights) * total
    counts = np.floor(shares).astype(int)
    for source in np.argsort(counts - shares, kind="stable")[: total - counts.sum()]:
        counts[source] += 1
    return [int(count) for count in counts]


def epoch_blocks(sizes: Sequence[int], counts: Sequence[int], seed: int, epoch: int) -> Blocks:
    """The shuffled blocks of an epoch.

    A source is an endless stream of passes, each of which has every sample once in a fresh order of fresh blocks. An
    epoch takes the stream's next `counts` samples: a source that is asked for more than it has repeats, one that is
    asked for less goes on with the rest in the next epoch.
    """
    parts: list[tuple[int, np.ndarray, np.ndarray]] = []
    for source, (size, count) in enumerate(zip(sizes, counts, strict=True)):
        first, end = epoch * count, (epoch + 1) * count
        for number in range(first // size if count else 0, -(-end // size) if count else 0):
            start, stop = _pass_blocks(size, np.random.default_rng([seed, 0, source, number]))
            start, stop = _cut(start, stop, first - number * size, end - number * size)
            parts.append((source, start, stop))
    sources = np.concatenate([np.full(len(start), source, dtype=np.int64) for source, start, _ in parts] or [_NONE])
    starts = np.concatenate([start for _, start, _ in parts] or [_NONE])
    stops = np.concatenate([stop for _, _, stop in parts] or [_NONE])
    order = np.random.default_rng([seed, 1, epoch]).permutation(len(sources))
    return Blocks(sources[order], starts[order], stops[order])


def num_lanes(num_documents: int, global_batch: int) -> int:
    """How many lanes an epoch has: a multiple of `global_batch`, or a divisor where there are few documents."""
    limit = max(1, num_documents // WINDOW_DOCUMENTS)
    multiples = range(global_batch, max(global_batch, NUM_LANES) + global_batch, global_batch)
    divisors = [number for number in range(1, global_batch) if global_batch % number == 0]
    return max(number for number in [*divisors, *multiples, 1] if number <= limit)


def spread_documents(
    blocks: Blocks,
    document_offsets: Sequence[np.ndarray],
    lanes: int,
    seed: int,
    epoch: int,
) -> DocumentOrder:
    """Deal blocks to lanes, cut the lanes into windows and spread the documents of each window.

    Args:
        document_offsets: for each source int64 (samples + 1,): sample i has the documents offsets[i] to
            offsets[i + 1]; documents are numbered through all sources.
    """
    generator = np.random.default_rng([seed, 2, epoch])
    first = np.empty(len(blocks), dtype=np.int64)
    last = np.empty(len(blocks), dtype=np.int64)
    for source, offsets in enumerate(document_offsets):
        mine = blocks.source == source
        first[mine], last[mine] = offsets[blocks.start[mine]], offsets[blocks.stop[mine]]
    # Lane after lane, each in the order of its blocks.
    lane_of_block = np.arange(len(blocks)) % lanes
    order = np.argsort(lane_of_block, kind="stable")
    first, count, lane_of_block = first[order], (last - first)[order], lane_of_block[order]
    unit_of_block = _units(count, lane_of_block, lanes, WINDOW_DOCUMENTS)

    block = np.repeat(np.arange(len(count)), count)
    ends = np.cumsum(count)
    documents = np.arange(len(block)) - np.repeat(ends - count, count) + first[block]
    # The k-th document of a block, by a draw, comes into the k-th of as many parts of the window.
    drawn = np.lexsort((generator.random(len(block)), block))
    rank = np.empty(len(block), dtype=np.int64)
    rank[drawn] = np.arange(len(block)) - np.repeat(ends - count, count)
    place = (rank + generator.random(len(block))) / count[block]
    order = np.lexsort((place, unit_of_block[block]))
    unit = unit_of_block[block][order]
    num_units = int(unit_of_block[-1]) + 1 if len(count) else 0
    return DocumentOrder(
        documents=documents[order],
        lane=lane_of_block[block][order],
        unit=unit,
        num_blocks=np.bincount(unit_of_block, minlength=num_units),
    )


_NONE = np.zeros(0, dtype=np.int64)


def _pass_blocks(size: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    # Blocks begin elsewhere in each pass, so that neighbours do not meet in every one.
    phase = int(generator.integers(BLOCK_SAMPLES))
    edges = np.unique(np.concatenate([[0, size], np.arange(phase, size, BLOCK_SAMPLES)]))
    order = generator.permutation(len(edges) - 1)
    return edges[:-1][order], edges[1:][order]


def _cut(start: np.ndarray, stop: np.ndarray, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
    """What of the blocks lies between samples number `first` and `end` of the pass."""
    after = np.cumsum(stop - start)
    before = after - (stop - start)
    kept = (after > first) & (before < end)
    return (start + np.maximum(first - before, 0))[kept], (stop - np.maximum(after - end, 0))[kept]


def _units(count: np.ndarray, lane: np.ndarray, lanes: int, window: int) -> np.ndarray:
    """The window of each block: int64, rising, none across lanes.

    The lanes' first windows have different sizes, so that the lanes come to new windows one after another.
    """
    units = []
    offset = 0
    for number in range(lanes):
        counts = count[lane == number]
        before = np.cumsum(counts) - counts
        unit = (before + window - (number + 1) * window // lanes) // window
        unit -= unit[0] if len(unit) else 0
        units.append(unit + offset)
        offset += int(unit[-1]) + 1 if len(unit) else 0
    return np.unique(np.concatenate(units), return_inverse=True)[1] if units else _NONE
