"""Samples in WebDataset tar shards: one JSON member and at most one image member each.

Plain webdataset reads the same tars. This reader verifies them first and never loses a sample in silence.
"""

from __future__ import annotations

import hashlib
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from shellv_core.data.index import IndexRow
from shellv_core.data.samples import Sample
from shellv_core.errors import DataError
from shellv_core.storage import FileEntry, InputDirectory, OutputDirectory

BLOCK_BYTES = 512
_RECORD_BYTES = 20 * BLOCK_BYTES
_NAME_BYTES = 100


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
    """Writes one tar, its index and its SHA-256; equal samples give equal bytes.

    The bytes are those of ``webdataset.TarWriter(mtime=0)``, whose headers cost several times as much as all the rest
    of a small sample. Use it as a context manager; `sha256` is complete after it.

    Args:
        path: a local file, overwritten.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[IndexRow] = []
        self.sha256 = ""

    def __enter__(self) -> ShardWriter:
        self._file = self.path.open("wb")
        self._digest = hashlib.sha256()
        self._offset = 0
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with self._file:
            if kind is None:
                end = self._offset + 2 * BLOCK_BYTES
                self._append(b"\0" * (end + -end % _RECORD_BYTES - self._offset))
                self.sha256 = self._digest.hexdigest()

    def write(self, sample: Sample, row: int = 0, num_tokens: tuple[int, ...] = ()) -> None:
        """Append a sample.

        Args:
            sample: its key must differ from the others'.
            row: position of the sample in its source.
            num_tokens: see `IndexRow`.
        """
        record, image = sample.to_json(), sample.image
        members = [("json", record)] if image is None else sorted([("json", record), (sample.image_format, image)])
        parts: list[bytes] = []
        positions: dict[str, int] = {}
        size = 0
        for suffix, content in members:
            positions[suffix] = size + BLOCK_BYTES
            padding = -len(content) % BLOCK_BYTES
            parts += (tar_header(f"{sample.key}.{suffix}", len(content)), content, bytes(padding))
            size += BLOCK_BYTES + len(content) + padding
        span = b"".join(parts)
        offset = self._offset
        self._append(span)
        self.rows.append(
            IndexRow(
                key=sample.key,
                source=sample.source,
                row=row,
                image_source=sample.image_source or "",
                offset=offset,
                size=size,
                json_offset=positions["json"],
                json_size=len(record),
                image_offset=0 if image is None else positions[sample.image_format],
                image_size=0 if image is None else len(image),
                image_format="" if image is None else sample.image_format,
                width=sample.width,
                height=sample.height,
                sha256=hashlib.sha256(span).digest(),
                image_sha256=b"" if image is None else hashlib.sha256(image).digest(),
                num_conversations=1 + len(sample.more_conversations),
                num_hallucinated=len(sample.hallucinated_captions),
                num_words=sample.num_words,
                num_tokens=num_tokens,
            )
        )

    def _append(self, data: bytes) -> None:
        self._file.write(data)
        self._digest.update(data)
        self._offset += len(data)


def tar_header(name: str, size: int) -> bytes:
    """The 512 bytes before a member of a shard: a plain file of `size` bytes, of no time and the owner "bigdata".

    Raises:
        DataError: if the name is longer than a header holds, 100 bytes, or the member than one can say, 8 GiB.
    """
    encoded = name.encode()
    if len(encoded) > _NAME_BYTES or size >= 8**11:
        raise DataError(
            f"{name!r} of {size} bytes does not fit into a tar: at most {_NAME_BYTES} bytes of name, 8 GiB."
        )
    start = encoded.ljust(_NAME_BYTES, b"\0") + b"0000444\0000000000\0000000000\0%011o\0%011o\0" % (size, 0)
    checksum = sum(start) + _AFTER_CHECKSUM_SUM
    return b"%b%06o\0 %b" % (start, checksum, _AFTER_CHECKSUM)


# Type "0" (a plain file), no link, magic, owner and group, no device numbers, no prefix.
_AFTER_CHECKSUM = b"0" + bytes(100) + b"ustar\x0000" + b"bigdata".ljust(32, b"\0") * 2 + bytes(16 + 155 + 12)
_AFTER_CHECKSUM_SUM = sum(_AFTER_CHECKSUM) + 8 * ord(" ")


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
    """Yield the samples of a split in the order in which they were written.

    Raises:
        DataError: if there is no such split, or a shard does not hold exactly the samples that the manifest counts.
        IntegrityError: if a shard's bytes differ from the manifest.
    """
    for shard in split_shards(source, split):
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
