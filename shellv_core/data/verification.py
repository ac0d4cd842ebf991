"""Checks every byte of a data set against its manifest, and names the samples that are damaged."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

from shellv_core.data.index import SPLITS, index_name, index_rows
from shellv_core.errors import DataError, ObjectNotFoundError, StorageError
from shellv_core.progress import Progress
from shellv_core.storage import FileEntry, InputDirectory, join, open_store

_CHUNK_BYTES = 8 << 20
_FILES_AT_ONCE = 4


@dataclass(frozen=True)
class Damage:
    """A file that is not what the manifest recorded.

    Attributes:
        name: the file.
        problem: what was found.
        samples: keys of the samples whose bytes are affected, where the file is a shard.
    """

    name: str
    problem: str
    samples: tuple[str, ...] = ()

    def __str__(self) -> str:
        if not self.samples:
            return f"{self.name}: {self.problem}"
        named = ", ".join(self.samples[:5])
        more = f" and {len(self.samples) - 5} more" if len(self.samples) > 5 else ""
        return f"{self.name}: {self.problem}; damaged samples: {named}{more}"


def verify(source: InputDirectory) -> list[Damage]:
    """Read every file of a committed folder and compare sizes and hashes; returns what differs, [] if all is well.

    Raises:
        StorageError: if the store does not answer.
    """
    entries = source.files()
    lock = threading.Lock()
    with (
        Progress(sum(entry.bytes for entry in entries) >> 20, f"verifying {source.uri}", "MiB") as progress,
        ThreadPoolExecutor(_FILES_AT_ONCE) as pool,
    ):

        def check(entry: FileEntry) -> Damage | None:
            found = _check(source, entry)
            with lock:
                progress.update(entry.bytes >> 20)
            return found

        damaged = [found for found in pool.map(check, entries) if found]
    broken = {damage.name for damage in damaged}
    return [_with_samples(source, damage, broken) for damage in damaged]


def _check(source: InputDirectory, entry: FileEntry) -> Damage | None:
    digest = hashlib.sha256()
    size = 0
    try:
        for chunk in _chunks(source, entry):
            digest.update(chunk)
            size += len(chunk)
        longer = bool(_read(source, entry.name, entry.bytes, 1))
    except ObjectNotFoundError:
        return Damage(entry.name, "missing")
    if size < entry.bytes:
        return Damage(entry.name, f"cut off after {size} of {entry.bytes} bytes")
    if longer:
        return Damage(entry.name, f"longer than the {entry.bytes} bytes recorded")
    if digest.hexdigest() != entry.sha256:
        return Damage(entry.name, f"SHA-256 {digest.hexdigest()[:12]}... instead of {entry.sha256[:12]}...")
    return None


def _chunks(source: InputDirectory, entry: FileEntry) -> Iterator[bytes]:
    for offset in range(0, entry.bytes, _CHUNK_BYTES):
        chunk = _read(source, entry.name, offset, min(_CHUNK_BYTES, entry.bytes - offset))
        if not chunk:
            return
        yield chunk


def _read(source: InputDirectory, name: str, offset: int, size: int) -> bytes:
    uri = join(source.uri, name)
    try:
        return open_store(uri).read_range(uri, offset, size)
    except ObjectNotFoundError:
        raise
    except StorageError as error:
        # A range that begins where an object ends is refused by S3 services.
        if "InvalidRange" in str(error) or "416" in str(error):
            return b""
        raise


def _with_samples(source: InputDirectory, damage: Damage, broken: set[str]) -> Damage:
    split = damage.name.partition("/")[0]
    if split not in SPLITS or not damage.name.endswith(".tar") or index_name(split) in broken:
        return damage
    try:
        rows = [row for row in index_rows(source.fetch(index_name(split))) if row["shard"] == damage.name]
    except (ObjectNotFoundError, DataError):
        return damage
    keys = []
    for row in rows:
        try:
            data = _read(source, damage.name, row["offset"], row["size"])
        except ObjectNotFoundError:
            data = b""
        if hashlib.sha256(data).digest() != row["sha256"]:
            keys.append(row["key"])
    return Damage(damage.name, damage.problem, tuple(keys))
