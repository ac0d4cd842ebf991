"""What the formats that are JSON lists beside images have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterator
from typing import Any, cast

from shellv_core.data.sources.base import Cursor, Mark, Source
from shellv_core.data.sources.blobs import local_copy
from shellv_core.data.sources.images import ImageStore
from shellv_core.data.sources.json_rows import iterate_rows
from shellv_core.errors import DataError


class JsonSource(Source):
    """Rows of a JSON list or of JSON Lines; a cursor is a byte offset.

    Args:
        name: address of the annotations.
        prefix: see `Source`.
        images: what the rows' image names lead to.

    Raises:
        DataError: if the annotations are no file.
        StorageError: if they cannot be fetched.
    """

    def __init__(self, name: str, prefix: str, images: ImageStore) -> None:
        self.name, self.prefix, self.images = name, prefix, images
        self._path = local_copy(name)
        if not self._path.is_file():
            raise DataError(f"{name!r} is not a file; give a JSON list of rows, or one row a line.")

    @abstractmethod
    def identity(self, row: Any) -> bytes:
        """Return 16 bytes, equal for rows that say the same about the same image."""

    def scan(self) -> Iterator[Mark]:
        """Yield a mark for every row; see `Source`."""
        for offset, row in iterate_rows(self._path, name=self.name):
            image = self.image_name(row)
            yield Mark(offset, self.identity(row), b"" if image is None else self.images.stamp(image))

    def rows(self, cursor: Cursor) -> Iterator[Any]:
        """Yield the rows from the byte offset `cursor` on."""
        return (row for _, row in iterate_rows(self._path, cast(int, cursor), name=self.name))
