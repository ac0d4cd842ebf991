"""Writes one unit of a plan: its rows become at most one shard a split, recorded in the output in one step."""

from __future__ import annotations

import contextlib
import hashlib
import io
import itertools
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shellv_core.config import Config
from shellv_core.data.ahead import map_ahead
from shellv_core.data.config import DataConfig
from shellv_core.data.index import index_table
from shellv_core.data.plan import SCENES, SPLITS, Split, Unit
from shellv_core.data.rewriting import Rewriter, measured_pairs
from shellv_core.data.samples import Sample, sample_conversations
from shellv_core.data.shards import Shard, ShardWriter, shard_name
from shellv_core.data.sources.base import RejectedRow, Source
from shellv_core.errors import DataError
from shellv_core.storage import Group, OutputDirectory

if TYPE_CHECKING:
    from shellv_core.data.encoder import ConversationEncoder

DUPLICATE = "duplicate row"

_REMOTE_READS = 16  # images of an object store in flight
_TOKENIZED_AT_ONCE = 256  # samples
_RESIZED_JPEG = {"quality": 95, "subsampling": 0}

Row = tuple[int, Sample | RejectedRow]  # position in the source, and what became of the row there


class UnitResult(Config):
    """What a unit has written.

    Attributes:
        shards: by split, those that got a sample.
        rejected: the bad rows.
        rewrites: counts of the hallucinated captions made, where they were asked for.
        pairs: (type, truth, lie) of some of them by caption, to be measured.
    """

    shards: dict[Split, dict[str, Any]]
    rejected: list[dict[str, Any]]
    rewrites: dict[str, Any] | None = None
    pairs: list[list[list[str]]] = []

    @classmethod
    def of(cls, group: Group) -> UnitResult:
        """Return what was noted with the unit's files."""
        return cls.model_validate(group.note)


@dataclass(frozen=True)
class UnitWriter:
    """Writes any unit of one plan.

    Attributes:
        settings: those that the plan was made with.
        seed: of the scenes.
        num_units: of the plan.
        sources: the row sources, opened, by their names in the settings.
        rewriter: makes hallucinated captions, if they are asked for.
        encoder: counts tokens, if that is asked for.
        output: where the files go.
        work: local scratch folder.
    """

    settings: DataConfig
    seed: int
    num_units: int
    sources: Mapping[str, Source]
    rewriter: Rewriter | None
    encoder: ConversationEncoder | None
    output: OutputDirectory
    work: Path

    def write(self, unit: Unit) -> Group:
        """Write the shards of `unit`, and record them in one step.

        Raises:
            DataError: if a conversation cannot be encoded, where tokens are counted.
        """
        folder = self.work / unit.group
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        rows: Iterable[Row]
        noted: dict[str, Any] = {}
        if unit.source == SCENES:
            rows = self._scenes(unit)
        else:
            rows = self._rows(unit)
            if self.rewriter is not None:
                rows, noted = self._rewritten(rows)
        rejected: list[RejectedRow] = []
        writers: dict[Split, ShardWriter] = {}
        with contextlib.ExitStack() as stack:
            for (number, result), num_tokens in self._counted(rows):
                if isinstance(result, RejectedRow):
                    rejected.append(result)
                    continue
                split = unit.split or split_of(result, self.settings.validation_fraction)
                if split not in writers:
                    writers[split] = stack.enter_context(ShardWriter(folder / f"{split}.tar"))
                writers[split].write(result, number, num_tokens)
        group = self._store(unit, writers, rejected, noted, folder)
        shutil.rmtree(folder)
        return group

    def _scenes(self, unit: Unit) -> Iterator[Row]:
        from shellv_core.data.scenes.generate import SceneRequest, scene_sample

        source, split = self.settings.scenes, unit.split
        if source is None or split is None:
            raise ValueError(f"{unit} is not of scenes")
        request = SceneRequest(source.scenes, self.seed, split, source.num_train)
        side = source.scenes.image_size
        for index in range(unit.first, unit.first + unit.count):
            image, record = scene_sample(request, index)
            yield index, replace(Sample.from_record(record["id"], record, image), width=side, height=side)

    def _rows(self, unit: Unit) -> Iterator[Row]:
        if unit.cursor is None:
            raise ValueError(f"{unit} has no cursor")
        source, duplicates = self.sources[unit.source], frozenset(unit.duplicates)

        def read(item: tuple[int, Any]) -> Row:
            number, row = item
            if number in duplicates:
                detail = "says the same about the same image as an earlier row"
                return number, RejectedRow(source.name, number, source.row_id(row), DUPLICATE, detail)
            sample = source.read(row, number)
            if isinstance(sample, Sample) and self.settings.resize_longest:
                sample = shrunk(sample, self.settings.resize_longest)
            return number, sample

        numbered = enumerate(itertools.islice(source.rows(unit.cursor), unit.count), unit.first)
        if not source.remote:
            yield from map(read, numbered)
            return
        with ThreadPoolExecutor(_REMOTE_READS) as pool:
            yield from map_ahead(pool, read, numbered, 4 * _REMOTE_READS)

    def _rewritten(self, rows: Iterable[Row]) -> tuple[list[Row], dict[str, Any]]:
        """The rows with hallucinated captions, and what the unit's note says of them."""
        if self.rewriter is None:
            raise ValueError("there is no rewriter")
        kept = list(rows)
        samples = [result for _, result in kept if isinstance(result, Sample)]
        changed, counts, rewritten = self.rewriter.rewrite(samples)
        remaining = iter(changed)
        result = [(number, each if isinstance(each, RejectedRow) else next(remaining)) for number, each in kept]
        return result, {"rewrites": counts.to_record(), "pairs": measured_pairs(rewritten, self.num_units)}

    def _counted(self, rows: Iterable[Row]) -> Iterator[tuple[Row, tuple[int, ...]]]:
        """The rows with the tokens of each of their conversations, none where tokens are not counted."""
        if self.encoder is None:
            for row in rows:
                yield row, ()
            return
        iterator = iter(rows)
        while chunk := list(itertools.islice(iterator, _TOKENIZED_AT_ONCE)):
            samples = [result for _, result in chunk if isinstance(result, Sample)]
            counts = iter(count_tokens(samples, self.encoder))
            for row in chunk:
                yield row, next(counts) if isinstance(row[1], Sample) else ()

    def _store(
        self,
        unit: Unit,
        writers: Mapping[Split, ShardWriter],
        rejected: list[RejectedRow],
        noted: dict[str, Any],
        folder: Path,
    ) -> Group:
        import pyarrow.parquet as pq

        files, scratch, hashes = {}, {}, {}
        shards: dict[Split, dict[str, Any]] = {}
        for split, writer in writers.items():
            name = shard_name(split, unit.shards[split])
            files[name], hashes[name] = writer.path, writer.sha256
            shards[split] = asdict(Shard(name, len(writer.rows), writer.path.stat().st_size, writer.sha256))
            part = folder / f"{split}.parquet"
            pq.write_table(index_table(writer.rows, name), part)
            scratch[part_name(split, unit)] = part
        note = UnitResult(shards=shards, rejected=[asdict(row) for row in rejected], **noted)
        return self.output.put_group(unit.group, files, scratch, note.model_dump(), hashes)


def part_name(split: Split, unit: Unit) -> str:
    """The name of the unit's part of a split's index, until the commit."""
    return f"parts/{split}-{unit.number:06d}.parquet"


def split_of(sample: Sample, validation_fraction: float) -> Split:
    """The split of a sample, by a hash of its image's bytes (of its id for text), so that an image is never in both."""
    if not validation_fraction:
        return "train"
    digest = hashlib.sha256(sample.image or sample.id.encode()).digest()
    return SPLITS[int.from_bytes(digest[-8:], "big") < validation_fraction * 2**64]


def count_tokens(samples: Sequence[Sample], encoder: ConversationEncoder) -> list[tuple[int, ...]]:
    """Tokens of each conversation of each sample, an image counting as one.

    Raises:
        DataError: naming the sample, if a conversation cannot be encoded.
    """
    conversations = [sample_conversations(sample) for sample in samples]
    try:
        lengths = iter([len(ids) for ids, _ in encoder([each for every in conversations for each in every], 1)])
        return [tuple(itertools.islice(lengths, len(every))) for every in conversations]
    except DataError:
        # Again one by one, to name the sample.
        for sample, every in zip(samples, conversations, strict=True):
            try:
                encoder(every, 1)
            except DataError as error:
                raise DataError(f"{sample.source}, id {sample.id!r}: {error}") from None
        raise


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
