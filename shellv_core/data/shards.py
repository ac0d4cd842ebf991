"""Samples in WebDataset tar shards: one JSON member and at most one image member each.

Plain webdataset reads the same tars. This reader verifies them first and never loses a sample in silence.
"""

from __future__ import annotations

import hashlib
import mmap
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType

from shellv_core.data.index import IndexRow, index_name
from shellv_core.data.reader import SplitReader
from shellv_core.data.samples import Sample
from shellv_core.errors import DataError
from shellv_core.storage import FileEntry, InputDirectory, OutputDirectory

HEADER_BYTES = 512


@dataclass(frozen=True)
class Shard:
    """One tar: its name in the folder, how many samples it holds, its size and its hash (hex)."""

    name: str
    num_samples: int
    bytes: int
    sha256: str

    @classmethod
    def of(cls, entry: FileEntry, num_samples: int) -> Shard:
        """Return the shard that was stored as `entry`."""
        return cls(entry.name, num_samples, entry.bytes, entry.sha256)


def shard_name(split: str, number: int) -> str:
    """Return for example "train/train-000007.tar"."""
    return f"{split}/{split}-{number:06d}.tar"


class ShardWriter:
    """Writes one tar with webdataset's writer, and its index and SHA-256 on the way; equal samples give equal bytes.

    Use it as a context manager; `rows` and `sha256` are complete after it.

    Args:
        path: a local file, overwritten.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[IndexRow] = []
        self.sha256 = ""

    def __enter__(self) -> ShardWriter:
        from webdataset import TarWriter

        self._file = self.path.open("wb")
        # A fixed mtime makes the tar reproducible, and spares the extra header that a fractional one costs.
        self._writer = TarWriter(self._file, encoder=False, mtime=0)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.close()
        self._file.close()
        if kind is None and self.rows:
            with self.path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
                self.sha256 = hashlib.sha256(data).hexdigest()
                view = memoryview(data)
                spans = (view[row.offset : row.offset + row.size] for row in self.rows)
                self.rows = [
                    replace(row, sha256=hashlib.sha256(span).digest())
                    for row, span in zip(self.rows, spans, strict=True)
                ]
                view.release()

    def write(
        self, sample: Sample, row: int = 0, size: tuple[int, int] = (0, 0), num_tokens: tuple[int, ...] = ()
    ) -> None:
        """Append a sample.

        Args:
            sample: its key must differ from the others'.
            row: position of the sample in its source.
            size: width and height of its image in pixels.
            num_tokens: see `IndexRow`.
        """
        record = sample.to_json()
        members = {"json": record}
        if sample.image is not None:
            members[sample.image_format] = sample.image
        offset = self._writer.tarstream.offset
        self._writer.write({"__key__": sample.key, **members})
        end = self._writer.tarstream.offset
        # The writer sorts the members by name: jpg, json, png.
        positions, position = {}, 0
        for name in sorted(members):
            positions[name] = position + HEADER_BYTES
            position += HEADER_BYTES + -(-len(members[name]) // HEADER_BYTES) * HEADER_BYTES
        if position != end - offset:
            raise DataError(f"sample key {sample.key!r} is too long for a tar header; use at most 90 characters.")
        image = sample.image or b""
        self.rows.append(
            IndexRow(
                key=sample.key,
                source=sample.source,
                row=row,
                image_source=sample.image_source or "",
                offset=offset,
                size=end - offset,
                json_offset=positions["json"],
                json_size=len(record),
                image_offset=positions[sample.image_format] if image else 0,
                image_size=len(image),
                image_format=sample.image_format if image else "",
                width=size[0],
                height=size[1],
                sha256=b"",
                image_sha256=hashlib.sha256(image).digest() if image else b"",
                num_conversations=1 + len(sample.more_conversations),
                num_hallucinated=len(sample.hallucinated_captions),
                num_words=sample.num_words,
                num_tokens=num_tokens,
            )
        )


def write_shard(samples: Iterable[Sample], output: OutputDirectory, name: str, work: Path) -> Shard:
    """Write samples as one shard; equal samples give equal bytes.

    Args:
        samples: Their keys must differ.
        output: Where the shard goes once it is complete.
        name: The shard's name there.
        work: A local folder for the unfinished tar.
    """
    work.mkdir(parents=True, exist_ok=True)
    path = work / "unfinished.tar"
    with ShardWriter(path) as writer:
        for number, sample in enumerate(samples):
            writer.write(sample, number)
    shard = Shard.of(output.put_file(path, name), len(writer.rows))
    path.unlink()
    return shard


def read_shards(source: InputDirectory, split: str) -> Iterator[Sample]:
    """Yield the samples of a split in the order in which they were written, read ahead and verified.

    Folders made before there was an index are read shard by shard.

    Raises:
        DataError: if there is no such split, or it does not hold exactly the samples that the manifest counts.
        IntegrityError: if a stored sample is damaged, or a whole shard where there is no index.
    """
    shards = split_shards(source, split)
    if source.files(index_name(split)):
        expected = sum(shard.num_samples for shard in shards)
        with SplitReader(source, split) as reader:
            if len(reader) != expected:
                raise DataError(
                    f"{source.uri}: the index of {split!r} has {len(reader)} samples, the manifest says {expected};"
                    " make the data again with prepare_data."
                )
            yield from reader.samples()
        return
    for shard in shards:
        number = 0
        for sample in _read_tar(source.fetch(shard.name)):
            yield sample
            number += 1
        if number != shard.num_samples:
            raise DataError(f"{source.uri}/{shard.name} holds {number} samples, its manifest says {shard.num_samples}.")


def split_shards(source: InputDirectory, split: str) -> list[Shard]:
    """Return the shards of a split as the manifest lists them.

    Raises:
        DataError: if the folder has no such split.
    """
    splits = source.manifest.details.get("splits", {})
    if split not in splits:
        raise DataError(
            f"{source.uri} has no split {split!r}; it has {sorted(splits)}. Is it an output of prepare_data?"
        )
    return [Shard(**shard) for shard in splits[split]["shards"]]


def count_samples(source: InputDirectory, split: str) -> int:
    """Return how many samples a split has, without reading it."""
    return sum(shard.num_samples for shard in split_shards(source, split))


def _read_tar(path: Path) -> Iterator[Sample]:
    with tarfile.open(path, "r:") as tar:
        key, record, image = "", None, None
        for member in tar:
            name, _, suffix = member.name.partition(".")
            if name != key:
                if key:
                    yield _sample(path, key, record, image)
                key, record, image = name, None, None
            opened = tar.extractfile(member)
            if opened is None:
                raise DataError(f"{path}: member {member.name!r} is not a file.")
            if suffix == "json":
                record = opened.read()
            else:
                image = opened.read()
        if key:
            yield _sample(path, key, record, image)


def _sample(path: Path, key: str, record: bytes | None, image: bytes | None) -> Sample:
    if record is None:
        raise DataError(f"{path}: sample {key!r} has no JSON member.")
    return Sample.from_json(key, record, image)
