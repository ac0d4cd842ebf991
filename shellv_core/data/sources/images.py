"""Images by name, from a folder, an archive or an object store."""

from __future__ import annotations

import os
import re
import sqlite3
import struct
import threading
import zipfile
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path, PurePosixPath
from typing import Protocol

from shellv_core.data.sources.base import BadRowError
from shellv_core.data.sources.blobs import Blob, cached, local, open_blob
from shellv_core.data.sources.tars import tar_members
from shellv_core.errors import DataError, ObjectNotFoundError
from shellv_core.progress import progress
from shellv_core.storage import join, read_bytes

_ARCHIVE = re.compile(r"(.*?\.(zip|tar))(?:/(.*))?", re.IGNORECASE | re.DOTALL)
# Most names, at a tenth of the cost of a path's parts.
_PLAIN_NAME = re.compile(r"(?:[\w-][\w.-]*/)*[\w-][\w.-]*", re.ASCII)
_LOCAL_HEADER = struct.Struct("<4s22xHH")  # a zip member's own header: magic, length of its name and of its extra field
_SPARE_BYTES = 256  # read beyond a zip member, whose own header may be longer than the directory tells


class ImageStore(Protocol):
    """Images by relative name; both methods are safe to call from several threads."""

    def read(self, name: str) -> bytes:
        """Return the bytes of image `name`.

        Raises:
            BadRowError: if the name leaves the store, or the image is missing or cannot be read.
        """

    def stamp(self, name: str) -> bytes:
        """Return bytes that change when the image does; empty where that cannot be told without reading it."""


def open_images(address: str) -> ImageStore:
    """Return the images at `address`: a folder, a ``.zip`` or ``.tar`` (or a folder in it), or an ``s3://`` prefix.

    Raises:
        DataError: if there is nothing of the kind, or an archive is damaged.
        StorageError: if the store refuses.
    """
    archive, kind, folder = archive_of(address)
    if archive:
        blob = open_blob(archive)
        return ZipImages(blob, folder) if kind == "zip" else TarImages(blob, folder)
    path = local(address)
    if path is None:
        return StoredImages(address)
    if not path.is_dir():
        raise DataError(
            f"{address!r} is not a folder; give the folder, .zip or .tar that the rows' image paths are relative to."
        )
    return FolderImages(path)


def archive_of(address: str) -> tuple[str, str, str]:
    """Split ``photos.zip/train`` into archive, kind and folder in it; the first is empty where there is no archive."""
    match, path = _ARCHIVE.fullmatch(address), local(address)
    if match is None or (path is not None and path.is_dir()):
        return "", "", ""
    return match[1], match[2].lower(), (match[3] or "").strip("/")


def checked_name(name: str) -> str:
    """Return `name` without ``.`` and doubled slashes, or raise `BadRowError` if it is not a path below the images."""
    if _PLAIN_NAME.fullmatch(name):
        return name
    parts = PurePosixPath(name).parts
    if not parts or name.startswith(("/", "\\")) or ".." in parts or "://" in name or "\0" in name:
        raise BadRowError("image path leaves the image folder", repr(name))
    return "/".join(parts)


class FolderImages:
    """Images below a local folder."""

    def __init__(self, path: Path) -> None:
        self._root = f"{path}/"

    def read(self, name: str) -> bytes:
        """Return the bytes of image `name`."""
        # Plain strings: for small images a Path costs as much as the reading.
        address = self._root + checked_name(name)
        try:
            with open(address, "rb") as file:  # noqa: PTH123
                return file.read()
        except (FileNotFoundError, IsADirectoryError, NotADirectoryError):
            raise BadRowError("image file missing", repr(name)) from None
        except (OSError, UnicodeEncodeError) as error:
            raise BadRowError("image file unreadable", f"{name!r}: {error}") from None

    def stamp(self, name: str) -> bytes:
        """Return size and modification time."""
        try:
            status = os.stat(self._root + name)  # noqa: PTH116
        except (OSError, ValueError):
            return b""
        return b"%d-%d" % (status.st_size, status.st_mtime_ns)


class StoredImages:
    """Images below an ``s3://`` prefix; taken as immutable, since asking for each one's version costs a request."""

    def __init__(self, uri: str) -> None:
        self._uri = uri

    def read(self, name: str) -> bytes:
        """Return the bytes of image `name`."""
        try:
            return read_bytes(join(self._uri, checked_name(name)))
        except ObjectNotFoundError:
            raise BadRowError("image file missing", repr(name)) from None

    def stamp(self, name: str) -> bytes:
        """Return nothing."""
        return b""


class _Members:
    """Name -> five numbers of an archive's members, in a file: a list of a million names needs no memory."""

    def __init__(self, blob: Blob, kind: str, members: Iterable[tuple[str, int, int, int, int, int]]) -> None:
        path = local(blob.address)
        place = blob.address if path is None else str(path.absolute())
        self._path = cached([place, blob.version], kind, lambda path: self._build(path, members))
        self._thread = threading.local()

    @staticmethod
    def _build(path: Path, members: Iterable[tuple[str, int, int, int, int, int]]) -> None:
        connection = sqlite3.connect(path)
        try:
            connection.execute("PRAGMA journal_mode = OFF")
            connection.execute("CREATE TABLE members (name TEXT PRIMARY KEY, a, b, c, d, e) WITHOUT ROWID")
            # Of several members of one name the last counts, as when the archive is unpacked.
            connection.executemany("INSERT OR REPLACE INTO members VALUES (?, ?, ?, ?, ?, ?)", members)
            connection.commit()
        finally:
            connection.close()

    def __getitem__(self, name: str) -> tuple[int, int, int, int, int] | None:
        connection = getattr(self._thread, "connection", None)
        if connection is None:
            connection = self._thread.connection = sqlite3.connect(f"{self._path.as_uri()}?mode=ro", uri=True)
        try:
            cursor = connection.execute("SELECT a, b, c, d, e FROM members WHERE name = ?", (name,))
        except UnicodeEncodeError:
            return None
        found: tuple[int, int, int, int, int] | None = cursor.fetchone()
        return found


class TarImages:
    """Images in an uncompressed tar, read by offset; its members are listed once for each version of it."""

    def __init__(self, blob: Blob, folder: str = "") -> None:
        self._blob, self._folder = blob, f"{folder}/" if folder else ""
        self._members = _Members(blob, "tar-members", self._list())

    def _list(self) -> Iterator[tuple[str, int, int, int, int, int]]:
        members = progress(tar_members(self._blob), description=f"list {self._blob.address}", unit="images")
        for member, _ in members:
            yield _storable(member.name), member.offset_data, member.size, 0, 0, 0

    def read(self, name: str) -> bytes:
        """Return the bytes of image `name`."""
        found = self._members[self._folder + checked_name(name)]
        if found is None:
            raise BadRowError("image file missing", repr(name))
        data = self._blob.read_at(found[0], found[1])
        if len(data) != found[1]:
            raise BadRowError("image file unreadable", f"{name!r}: {self._blob.address} has changed and is shorter now")
        return data

    def stamp(self, name: str) -> bytes:
        """Return the tar's version: its members carry no checksum."""
        return self._blob.version.encode()


class ZipImages:
    """Images in a zip, stored or deflated, read by offset; its directory is listed once for each version of it."""

    def __init__(self, blob: Blob, folder: str = "") -> None:
        self._blob, self._folder = blob, f"{folder}/" if folder else ""
        self._members = _Members(blob, "zip-members", self._list())

    def _list(self) -> Iterator[tuple[str, int, int, int, int, int]]:
        try:
            with self._blob.open() as file, zipfile.ZipFile(file) as archive:
                for item in archive.infolist():
                    if not item.is_dir():
                        method = -1 if item.flag_bits & 1 else item.compress_type
                        sizes = item.compress_size, item.file_size
                        yield _storable(item.filename), item.header_offset, *sizes, method, item.CRC
        except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
            raise DataError(
                f"{self._blob.address} is not a whole zip archive ({error}). Fetch the file again."
            ) from None

    def read(self, name: str) -> bytes:
        """Return the bytes of image `name`, their checksum verified."""
        found = self._members[self._folder + checked_name(name)]
        if found is None:
            raise BadRowError("image file missing", repr(name))
        offset, packed_size, size, method, crc = found
        data = self._packed(offset, packed_size, len(self._folder + name))
        if data is not None and method == zipfile.ZIP_DEFLATED:
            try:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            except zlib.error:
                data = None
        elif method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise BadRowError(
                "image file unreadable", f"{name!r}: {'encrypted' if method < 0 else f'compression method {method}'}"
            )
        if data is None or len(data) != size or zlib.crc32(data) != crc:
            raise BadRowError("image truncated or corrupt", f"{name!r}: its checksum in {self._blob.address} differs")
        return data

    def _packed(self, offset: int, size: int, name_length: int) -> bytes | None:
        head = _LOCAL_HEADER.size
        block = self._blob.read_at(offset, head + 4 * name_length + _SPARE_BYTES + size)
        if len(block) < head:
            return None
        magic, name_bytes, extra_bytes = _LOCAL_HEADER.unpack_from(block)
        if magic != b"PK\x03\x04":
            return None
        start = head + name_bytes + extra_bytes
        if start + size > len(block):
            return self._blob.read_at(offset + start, size)
        return block[start : start + size]

    def stamp(self, name: str) -> bytes:
        """Return size and CRC-32."""
        try:
            found = self._members[self._folder + checked_name(name)]
        except BadRowError:
            return b""
        return b"" if found is None else b"%d-%d" % (found[2], found[4])


def _storable(name: str) -> str:
    """Return a member's name as rows spell it: without ``./``, and writable as UTF-8."""
    name = "/".join(part for part in name.split("/") if part not in ("", "."))
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
