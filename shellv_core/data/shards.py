"""Samples in WebDataset tar shards: one JSON member and at most one image member each.

Plain webdataset reads the same tars. This reader verifies them first and never loses a sample in silence.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from shellv_core.data.samples import Sample
from shellv_core.errors import DataError
from shellv_core.storage import FileEntry, InputDirectory, OutputDirectory


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


def write_shard(samples: Iterable[Sample], output: OutputDirectory, name: str, work: Path) -> Shard:
    """Write samples as one shard; equal samples give equal bytes.

    Args:
        samples: Their keys must differ.
        output: Where the shard goes once it is complete.
        name: The shard's name there.
        work: A local folder for the unfinished tar.
    """
    from webdataset import TarWriter

    work.mkdir(parents=True, exist_ok=True)
    path = work / "unfinished.tar"
    number = 0
    # A fixed mtime makes the tar reproducible.
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for sample in samples:
            members = {"__key__": sample.key, "json": sample.to_json()}
            if sample.image is not None:
                members[sample.image_format] = sample.image
            writer.write(members)
            number += 1
    shard = Shard.of(output.put_file(path, name), number)
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
