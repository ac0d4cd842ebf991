"""The plan of a data set: units of work that know their rows in advance.

A unit is a range of one source's rows and becomes at most one shard a split. Units share nothing, so they are written
in any order, by worker processes or by pods, and again after a crash, always with the same bytes.
"""

from __future__ import annotations

import hashlib
import itertools
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from shellv_core.config import Config, canonical_json
from shellv_core.data.ahead import map_ahead
from shellv_core.data.config import DataConfig
from shellv_core.data.samples import Sample
from shellv_core.data.sources.base import Cursor, Mark, Source
from shellv_core.errors import DataError
from shellv_core.progress import Progress

Split = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")
SCENES = "scenes"

_IDENTITY_BYTES = 16
_READS = 16  # images in flight


class Unit(Config):
    """A range of one source's rows.

    Attributes:
        number: position among the units of the plan.
        source: its name in the settings.
        split: of the samples; None where each sample's image decides.
        first, count: the rows.
        cursor: where `first` begins in the source.
        duplicates: those of the rows that repeat an earlier one.
        shards: number of the unit's shard in each split.
    """

    number: int
    source: str
    split: Split | None = None
    first: int
    count: int
    cursor: Cursor | None = None
    duplicates: tuple[int, ...] = ()
    shards: dict[Split, int]

    @property
    def group(self) -> str:
        """The name under which an output records what the unit has written."""
        return f"unit-{self.number:06d}"


class Plan(Config):
    """All units of a data set.

    Attributes:
        num_rows: rows by source, bad ones included.
        stamp: hash of everything that the units will read, as far as that can be told without reading the images.
    """

    units: tuple[Unit, ...]
    num_rows: dict[str, int]
    stamp: str

    @property
    def total_rows(self) -> int:
        """Rows of all sources that are not scenes."""
        return sum(number for source, number in self.num_rows.items() if source != SCENES)

    def ranges(self, number: int) -> list[tuple[int, int]]:
        """Cut the units into at most `number` ranges (first, stop) of nearly equal length."""
        edges = np.linspace(0, len(self.units), min(number, len(self.units)) + 1).round().astype(int).tolist()
        return list(itertools.pairwise(edges))


def make_plan(settings: DataConfig, sources: dict[str, Source]) -> Plan:
    """Pass over all sources once.

    Args:
        sources: those of ``settings.row_sources()``, opened.

    Raises:
        DataError: if a source cannot be read or holds no rows.
    """
    units: list[Unit] = []
    num_rows: dict[str, int] = {}
    used = dict.fromkeys(SPLITS, 0)
    digest = hashlib.sha256()
    size = settings.samples_per_shard
    if settings.scenes is not None:
        numbers: dict[Split, int] = {"train": settings.scenes.num_train, "validation": settings.scenes.num_validation}
        num_rows[SCENES] = sum(numbers.values())
        for split, number in numbers.items():
            for first in range(0, number, size):
                count = min(size, number - first)
                shards: dict[Split, int] = {split: used[split]}
                units.append(
                    Unit(number=len(units), source=SCENES, split=split, first=first, count=count, shards=shards)
                )
                used[split] += 1
    scanned = [(name, *_scan(source, size, settings.deduplicate == "content")) for name, source in sources.items()]
    duplicates = _duplicates([identities for *_, identities in scanned], settings.deduplicate != "off")
    for (name, cursors, count, source_digest, _), repeated in zip(scanned, duplicates, strict=True):
        if not count:
            raise DataError(f"{sources[name].name} holds no rows.")
        num_rows[name] = count
        digest.update(canonical_json([name, source_digest]))
        for position, cursor in enumerate(cursors):
            first = position * size
            stop = min(first + size, count)
            low, high = np.searchsorted(repeated, [first, stop])
            unit = Unit(
                number=len(units),
                source=name,
                first=first,
                count=stop - first,
                cursor=cursor,
                duplicates=tuple(repeated[low:high].tolist()),
                shards={split: used[split] + position for split in SPLITS},
            )
            units.append(unit)
        used = {split: number + len(cursors) for split, number in used.items()}
    return Plan(units=tuple(units), num_rows=num_rows, stamp=digest.hexdigest())


def _scan(source: Source, size: int, by_content: bool) -> tuple[list[Cursor], int, str, bytearray]:
    """Cursors of every `size`-th row, number of rows, hash of the source, and the rows' identities end to end."""
    cursors: list[Cursor] = []
    identities = bytearray()
    digest = hashlib.sha256()
    count = 0
    with Progress(None, f"reading {source.name}", "rows") as progress:
        for mark, identity in _by_content(source) if by_content else ((mark, mark.identity) for mark in source.scan()):
            if count % size == 0:
                cursors.append(mark.cursor)
            identities += identity
            digest.update(mark.identity + len(mark.stamp).to_bytes(2, "big") + mark.stamp)
            count += 1
            progress.update()
    return cursors, count, digest.hexdigest(), identities


def _by_content(source: Source) -> Iterator[tuple[Mark, bytes]]:
    """Marks with identities that go by the image's bytes; a bad row keeps that of its text."""

    def identify(item: tuple[Mark, tuple[int, Any]]) -> tuple[Mark, bytes]:
        mark, (number, row) = item
        sample = source.read(row, number)
        if not isinstance(sample, Sample):
            return mark, mark.identity
        says = replace(sample, key="", id="", image=None, image_format="jpg", source="", image_source=None)
        digest = hashlib.sha256(says.to_json())
        digest.update(sample.image or b"")
        return mark, digest.digest()[:_IDENTITY_BYTES]

    marks = source.scan()
    first = next(marks, None)
    if first is None:
        return
    numbered = enumerate(source.rows(first.cursor))
    with ThreadPoolExecutor(_READS) as pool:
        yield from map_ahead(pool, identify, zip(itertools.chain([first], marks), numbered, strict=True), 4 * _READS)


def _duplicates(identities: list[bytearray], wanted: bool) -> Iterator[np.ndarray]:
    """For each source the rows that repeat an earlier row of any source, in rising order."""
    if not wanted:
        yield from (np.zeros(0, dtype=np.int64) for _ in identities)
        return
    halves = np.frombuffer(b"".join(identities), dtype=np.uint64).reshape(-1, 2)
    # Stable: of equal rows the earliest comes first.
    order = np.lexsort((halves[:, 1], halves[:, 0]))
    same = (halves[order[1:]] == halves[order[:-1]]).all(axis=1)
    repeated = np.sort(order[1:][same])
    start = 0
    for each in identities:
        stop = start + len(each) // _IDENTITY_BYTES
        low, high = np.searchsorted(repeated, [start, stop])
        yield repeated[low:high] - start
        start = stop
