"""Writes one unit of a plan: its rows become at most one shard a split, recorded in the output in one step."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from shellv_core.config import Config
from shellv_core.data.ahead import map_ahead
from shellv_core.data.config import DataConfig
from shellv_core.data.index import index_table
from shellv_core.data.plan import SCENES, SPLITS, Split, Unit
from shellv_core.data.samples import Sample
from shellv_core.data.shards import Shard, ShardWriter, shard_name
from shellv_core.data.sources.base import RejectedRow, Source
from shellv_core.storage import Group, OutputDirectory

_REMOTE_READS = 16  # images of an object store in flight
_RESIZED_JPEG = {"quality": 95, "subsampling": 0}
DUPLICATE = "duplicate row"


class UnitResult(Config):
    """What a unit has written.

    Attributes:
        shards: by split, those that got a sample.
        rejected: the bad rows.
    """

    shards: dict[Split, dict[str, Any]]
    rejected: list[dict[str, Any]]

    @classmethod
    def of(cls, group: Group) -> UnitResult:
        """Return what was noted with the unit's files."""
        return cls.model_validate(group.note)


def write_unit(
    settings: DataConfig, seed: int, unit: Unit, sources: Mapping[str, Source], output: OutputDirectory, work: Path
) -> Group:
    """Write the shards of `unit` to `output`.

    Args:
        seed: of the scenes.
        sources: the row sources, opened, by their names in the settings.
        work: local scratch folder.
    """
    folder = work / unit.group
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    results = _scenes(settings, seed, unit) if unit.source == SCENES else _rows(settings, unit, sources[unit.source])
    rejected: list[RejectedRow] = []
    writers: dict[Split, ShardWriter] = {}
    with contextlib.ExitStack() as stack:
        for row, result in results:
            if isinstance(result, RejectedRow):
                rejected.append(result)
                continue
            split = unit.split or split_of(result, settings.validation_fraction)
            if split not in writers:
                writers[split] = stack.enter_context(ShardWriter(folder / f"{split}.tar"))
            writers[split].write(result, row)
    group = _store(unit, writers, rejected, output, folder)
    shutil.rmtree(folder)
    return group


def _store(
    unit: Unit, writers: Mapping[Split, ShardWriter], rejected: list[RejectedRow], output: OutputDirectory, folder: Path
) -> Group:
    import pyarrow.parquet as pq

    files, scratch, hashes = {}, {}, {}
    shards: dict[Split, dict[str, Any]] = {}
    for split, writer in writers.items():
        name = shard_name(split, unit.shards[split])
        files[name], hashes[name] = writer.path, writer.sha256
        shard = Shard(name, len(writer.rows), writer.path.stat().st_size, writer.sha256)
        shards[split] = asdict(shard)
        part = folder / f"{split}.parquet"
        pq.write_table(index_table(writer.rows, name), part)
        scratch[part_name(split, unit)] = part
    note = UnitResult(shards=shards, rejected=[asdict(row) for row in rejected])
    return output.put_group(unit.group, files, scratch, note.model_dump(), hashes)


def part_name(split: Split, unit: Unit) -> str:
    """The name of the unit's part of a split's index, until the commit."""
    return f"parts/{split}-{unit.number:06d}.parquet"


def split_of(sample: Sample, validation_fraction: float) -> Split:
    """The split of a sample, by a hash of its image's bytes (of its id for text), so that an image is never in both."""
    if not validation_fraction:
        return "train"
    digest = hashlib.sha256(sample.image or sample.id.encode()).digest()
    return SPLITS[int.from_bytes(digest[-8:], "big") < validation_fraction * 2**64]


def _scenes(settings: DataConfig, seed: int, unit: Unit) -> Iterator[tuple[int, Sample]]:
    from shellv_core.data.scenes.generate import SceneRequest, scene_sample

    source, split = settings.scenes, unit.split
    if source is None or split is None:
        raise ValueError(f"{unit} is not of scenes")
    request = SceneRequest(source.scenes, seed, split, source.num_train)
    side = source.scenes.image_size
    for index in range(unit.first, unit.first + unit.count):
        image, record = scene_sample(request, index)
        yield index, replace(Sample.from_record(record["id"], record, image), width=side, height=side)


def _rows(settings: DataConfig, unit: Unit, source: Source) -> Iterator[tuple[int, Sample | RejectedRow]]:
    if unit.cursor is None:
        raise ValueError(f"{unit} has no cursor")
    rows = itertools.islice(source.rows(unit.cursor), unit.count)
    numbered = enumerate(rows, unit.first)
    read = partial(_read, settings, source, frozenset(unit.duplicates))
    if not source.remote:
        yield from map(read, numbered)
        return
    with ThreadPoolExecutor(_REMOTE_READS) as pool:
        yield from map_ahead(pool, read, numbered, 4 * _REMOTE_READS)


def _read(
    settings: DataConfig, source: Source, duplicates: frozenset[int], item: tuple[int, Any]
) -> tuple[int, Sample | RejectedRow]:
    number, row = item
    if number in duplicates:
        detail = "says the same about the same image as an earlier row"
        return number, RejectedRow(source.name, number, source.row_id(row), DUPLICATE, detail)
    sample = source.read(row, number)
    if isinstance(sample, Sample) and settings.resize_longest:
        sample = shrunk(sample, settings.resize_longest)
    return number, sample


def shrunk(sample: Sample, longest: int) -> Sample:
    """The sample with an image of at most `longest` pixels a side, as JPEG (quality 95, 4:4:4); smaller ones stay."""
    from PIL import Image

    if sample.image is None or max(sample.width, sample.height) <= longest:
        return sample
    with Image.open(io.BytesIO(sample.image)) as image:
        scale = longest / max(image.size)
        size = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image.convert("RGB").resize(size, Image.Resampling.BICUBIC)
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", **_RESIZED_JPEG)
    return replace(sample, image=buffer.getvalue(), image_format="jpg", width=size[0], height=size[1])
