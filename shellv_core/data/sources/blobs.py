"""Bytes at any place of a local file or a stored object, and copies on this machine of what must be a local file."""

from __future__ import annotations

import fnmatch
import gzip
import hashlib
import io
import os
import uuid
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO, Protocol, cast

from shellv_core.errors import DataError, ObjectNotFoundError, StorageAccessError
from shellv_core.progress import Progress
from shellv_core.storage import ObjectStatus, download, home, list_uris, local_path, open_store

_READ_AHEAD_BYTES = 8 << 20
_COPY_BYTES = 1 << 20


class Blob(Protocol):
    """One file or object, read at any place.

    Attributes:
        address: as the user gave it.
        size: in bytes.
        version: changes when the content does.
    """

    address: str
    size: int
    version: str

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer at the end; safe to call from several threads."""

    def open(self) -> BinaryIO:
        """Return a seekable file of its own, fit for reading in order."""


class LocalBlob:
    """A file on this machine."""

    def __init__(self, path: Path, address: str) -> None:
        self.address, self._path = address, path
        try:
            with path.open("rb") as file:
                status = os.fstat(file.fileno())
        except OSError as error:
            raise _unreadable(address, error) from None
        self.size, self.version = status.st_size, f"{status.st_size}-{status.st_mtime_ns}"

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer at the end."""
        try:
            with self._path.open("rb", buffering=0) as file:
                return os.pread(file.fileno(), size, offset)
        except OSError as error:
            raise _unreadable(self.address, error) from None

    def open(self) -> BinaryIO:
        """Return a file of its own."""
        return self._path.open("rb")


class StoredBlob:
    """An object in a store, read by ranges."""

    def __init__(self, uri: str) -> None:
        self.address, self._store = uri, open_store(uri)
        status: ObjectStatus = self._store.status(uri)
        self.size, self.version = status.bytes, status.version

    def read_at(self, offset: int, size: int) -> bytes:
        """Return `size` bytes from `offset`, fewer at the end."""
        size = min(size, self.size - offset)
        return self._store.read_range(self.address, offset, size) if size > 0 else b""

    def open(self) -> BinaryIO:
        """Return a file that reads 8 MiB ahead."""
        return cast(BinaryIO, io.BufferedReader(_RangedFile(self), _READ_AHEAD_BYTES))


class _RangedFile(io.RawIOBase):
    def __init__(self, blob: StoredBlob) -> None:
        self._blob, self._position = blob, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._blob.size}[whence]
        self._position = max(start + offset, 0)
        return self._position

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        data = self._blob.read_at(self._position, len(buffer))
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def open_blob(address: str) -> Blob:
    """Open a local path, a ``file://`` or an ``s3://`` URI.

    Raises:
        StorageError: if it is missing or cannot be read.
    """
    path = local(address)
    return StoredBlob(address) if path is None else LocalBlob(path, address)


def local(address: str) -> Path | None:
    """Return the local path that `address` means; None if it is an object's."""
    return local_path(address) if "://" in address else Path(address)


def local_copy(address: str) -> Path:
    """Return a local, uncompressed file with the content of `address`, made once for each version of it.

    Raises:
        DataError: if it cannot be read, or its compression is damaged.
        StorageError: if the store refuses.
    """
    path = local(address)
    if path is None:
        uri, version = address, open_store(address).status(address).version
        path = cached([uri, version], "annotations", lambda copy: download(uri, copy))
    if not address.endswith(".gz"):
        return path
    packed = path
    try:
        found = packed.stat()
    except OSError as error:
        raise _unreadable(address, error) from None
    key = [str(packed.absolute()), str(found.st_size), str(found.st_mtime_ns)]
    return cached(key, "unpacked", lambda copy: _unpack(packed, copy, address))


def cached(key: list[str], kind: str, build: Callable[[Path], None]) -> Path:
    """Return the file of `key` below the project folder's cache; `build` writes it where there is none.

    Processes that need it at the same time may each build it; the file appears whole in any case.
    """
    name = hashlib.sha256("\0".join([kind, *key]).encode("utf-8", "surrogateescape")).hexdigest()
    path = home() / "cache" / "sources" / f"{kind}-{name[:32]}"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
        try:
            build(unfinished)
            unfinished.replace(path)
        finally:
            unfinished.unlink(missing_ok=True)
    return path


def _unpack(packed: Path, copy: Path, address: str) -> None:
    total = packed.stat().st_size
    with packed.open("rb") as raw, copy.open("wb") as target, Progress(total, f"unpack {packed.name}", "B") as progress:
        before = 0
        try:
            with gzip.open(raw) as file:
                while data := file.read(_COPY_BYTES):
                    target.write(data)
                    progress.update(raw.tell() - before)
                    before = raw.tell()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise DataError(f"{address} is damaged: {error}. Fetch the file again.") from None


def find_files(address: str, suffixes: tuple[str, ...], pattern: str) -> list[tuple[str, str]]:
    """Return (name below `address`, address) of a file, or of the files at any depth of a folder or prefix, by name.

    Args:
        address: a file if it ends in one of `suffixes`, else a folder or an ``s3://`` prefix.
        suffixes: of the files that count.
        pattern: as in a shell; a file counts if its name or its path below the folder matches.

    Raises:
        DataError: if nothing counts.
    """
    path = local(address)
    if address.endswith(suffixes) and (path is None or not path.is_dir()):
        return [(address.rstrip("/").rpartition("/")[2], address)]
    if path is None:
        root = address.rstrip("/") + "/"
        found = [(uri.removeprefix(root), uri) for uri in list_uris(address)]
    else:
        found = [(each.relative_to(path).as_posix(), str(each)) for each in path.rglob("*") if each.is_file()]
    files = sorted(
        (name, where)
        for name, where in found
        if name.endswith(suffixes)
        and not any(part.startswith(".") for part in name.split("/"))
        and (fnmatch.fnmatch(name, pattern) or fnmatch.fnmatch(name.rpartition("/")[2], pattern))
    )
    if not files:
        raise DataError(f"{address!r} holds no {' or '.join(suffixes)} file that matches {pattern!r}.")
    return files


def _unreadable(address: str, error: OSError) -> StorageAccessError | ObjectNotFoundError:
    if isinstance(error, FileNotFoundError):
        return ObjectNotFoundError(f"{address}: no such file.")
    return StorageAccessError(f"{address} cannot be read: {error.strerror}.")
