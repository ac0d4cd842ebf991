"""A folder of images, each beside a file of the same stem that describes it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

from shellv_core.data.samples import Sample
from shellv_core.data.sources.base import BadRowError, Cursor, Mark, Source
from shellv_core.data.sources.blobs import local
from shellv_core.data.sources.checks import (
    check_unicode,
    checked_captions,
    checked_object,
    identity_of,
    printable,
    sample_of,
)
from shellv_core.data.sources.config import FolderSource
from shellv_core.data.sources.images import FolderImages, StoredImages
from shellv_core.errors import DataError
from shellv_core.storage import list_uris

#: Files that count as images; those that are neither JPEG nor PNG are refused by name.
IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff"})
SIDECAR_SUFFIXES = (".json", ".txt", ".caption")  # the first that is there counts


class FolderRows(Source):
    """Images of a folder in the order of their paths; a cursor is an image's path, a row that and its sidecar's.

    Memory holds the names of one folder at a time; of an ``s3://`` prefix, all names.

    Raises:
        DataError: if there is no such folder.
    """

    def __init__(self, config: FolderSource) -> None:
        self.name, self.prefix = config.folder, config.prefix
        self._folder = local(config.folder)
        if self._folder is not None and not self._folder.is_dir():
            raise DataError(f"{config.folder!r} is not a folder; give one with images and their captions.")
        self._files = StoredImages(config.folder) if self._folder is None else FolderImages(self._folder)

    def scan(self) -> Iterator[Mark]:
        """Yield a mark for every image; names differ, so no two are duplicates."""
        for image, sidecar in self.rows(""):
            stamp = self._files.stamp(image) + b"+" + (self._files.stamp(sidecar) if sidecar else b"")
            yield Mark(image, identity_of(image), stamp)

    def rows(self, cursor: Cursor) -> Iterator[Any]:
        """Yield (image, sidecar or None) from the image of the path `cursor` on."""
        start = str(cursor).split("/") if cursor else []
        return self._stored(start) if self._folder is None else _walk(self._folder, "", start)

    def row_id(self, row: Any) -> str | None:
        """Return the image's path without its suffix."""
        return printable(str(PurePosixPath(row[0]).with_suffix("")))

    def image_name(self, row: Any) -> str | None:
        """Return the image's path in the folder."""
        return str(row[0])

    def sample(self, row: Any, number: int) -> Sample:
        """Return the image and what its sidecar says; see `Source`."""
        image, sidecar = row
        check_unicode(image)
        if sidecar is None:
            raise BadRowError("no caption", f"no {' or '.join(SIDECAR_SUFFIXES)} of the same name beside it")
        return sample_of(
            _described(sidecar, self._files.read(sidecar)),
            key=self.key(number),
            default_id=str(PurePosixPath(image).with_suffix("")),
            source=self.name,
            image_name=image,
            read=self._files.read,
        )

    def _stored(self, start: list[str]) -> Iterator[tuple[str, str | None]]:
        root = self.name.rstrip("/") + "/"
        folders: dict[str, list[str]] = {}
        for uri in list_uris(self.name):
            folder, _, name = uri.removeprefix(root).rpartition("/")
            folders.setdefault(folder, []).append(name)
        images = [
            ([*filter(None, folder.split("/")), image], sidecar)
            for folder, names in folders.items()
            if not any(part.startswith(".") for part in folder.split("/"))
            for image, sidecar in _pairs(names)
        ]
        for parts, sidecar in sorted(images, key=lambda item: item[0]):
            if parts >= start:
                yield "/".join(parts), sidecar and "/".join([*parts[:-1], sidecar])


def _walk(folder: Path, below: str, start: list[str]) -> Iterator[tuple[str, str | None]]:
    """Yield image and sidecar in the order of the paths' parts, from the path `start` on."""
    with os.scandir(folder) as entries:
        kinds = {
            entry.name: entry.is_dir(follow_symlinks=False)
            for entry in entries
            if not entry.name.startswith(".") and not (entry.is_symlink() and entry.is_dir())
        }
    found: list[tuple[str, str | None]] = [(name, None) for name, is_folder in kinds.items() if is_folder]
    found += _pairs([name for name, is_folder in kinds.items() if not is_folder])
    for name, sidecar in sorted(found):
        if start and name < start[0]:
            continue
        if kinds[name]:
            yield from _walk(folder / name, f"{below}{name}/", start[1:] if start and name == start[0] else [])
        else:
            yield below + name, sidecar and below + sidecar


def _pairs(names: list[str]) -> list[tuple[str, str | None]]:
    sidecars = {name for name in names if PurePosixPath(name).suffix.lower() in SIDECAR_SUFFIXES}
    pairs = []
    for name in names:
        path = PurePosixPath(name)
        if path.suffix.lower() in IMAGE_SUFFIXES and not name.startswith("."):
            beside = (path.stem + suffix for suffix in SIDECAR_SUFFIXES)
            pairs.append((name, next((each for each in beside if each in sidecars), None)))
    return pairs


def _described(name: str, data: bytes) -> dict[str, Any]:
    """Return the row that a sidecar holds."""
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise BadRowError("row is not UTF-8", f"{name!r}: {error.reason} at byte {error.start}") from None
    if not name.endswith(".json"):
        (caption,) = checked_captions([text])
        return {"caption": caption}
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise BadRowError("record unreadable", f"{name!r}: {error}") from None
    return dict(checked_object(row))
