"""Tab-separated captions and image paths, as tools for CC3M and CC12M write them."""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from typing import Any, cast

from shellv_core.data.samples import Sample
from shellv_core.data.sources.base import BadRowError, Cursor, Mark, Source
from shellv_core.data.sources.blobs import local_copy
from shellv_core.data.sources.checks import checked_captions, identity_of, sample_of
from shellv_core.data.sources.config import TsvSource
from shellv_core.data.sources.images import open_images
from shellv_core.errors import ConfigError, DataError

_MAX_LINE_BYTES = 1 << 20


class TsvRows(Source):
    """Lines of a table; a cursor is a byte offset, a row the line's bytes. Empty lines are no rows.

    Raises:
        ConfigError: if a column's name is not in the header.
        DataError: if the annotations are no file.
    """

    def __init__(self, config: TsvSource) -> None:
        self.name, self.prefix, self._images = config.annotations, config.prefix, open_images(config.images)
        self._path = local_copy(config.annotations)
        if not self._path.is_file():
            raise DataError(f"{self.name!r} is not a file; give lines of a caption, a tab and an image path.")
        columns = (config.caption_column, config.image_column)
        header = config.header or any(isinstance(column, str) for column in columns)
        with self._path.open("rb") as file:
            self._start = len(codecs.BOM_UTF8) if file.read(3) == codecs.BOM_UTF8 else 0
            if header:
                file.seek(self._start)
                names = file.readline(_MAX_LINE_BYTES).rstrip(b"\r\n").decode(errors="replace").split("\t")
                self._start = file.tell()
        for column in columns:
            if isinstance(column, str) and column not in names:
                raise ConfigError(f"{self.name} has no column {column!r}; its first line names {names}.")
        self._caption, self._image = (names.index(each) if isinstance(each, str) else each for each in columns)

    def scan(self) -> Iterator[Mark]:
        """Yield a mark for every line; see `Source`."""
        for offset, row in self._lines(self._start):
            image = self.image_name(row)
            yield Mark(offset, identity_of(row.decode("latin-1")), b"" if image is None else self._images.stamp(image))

    def rows(self, cursor: Cursor) -> Iterator[Any]:
        """Yield the lines from the byte offset `cursor` on."""
        return (row for _, row in self._lines(cast(int, cursor)))

    def row_id(self, row: Any) -> str | None:
        """Return None: lines have no ids."""
        return None

    def image_name(self, row: Any) -> str | None:
        """Return the image's column."""
        try:
            return self._columns(row)[1]
        except BadRowError:
            return None

    def sample(self, row: Any, number: int) -> Sample:
        """Return the line as a sample; see `Source`."""
        caption, image = self._columns(row)
        if not image:
            raise BadRowError("no image", "the image's column is empty")
        (caption,) = checked_captions([caption])
        return sample_of(
            {"caption": caption},
            key=self.key(number),
            default_id=str(number),
            source=self.name,
            image_name=image,
            read=self._images.read,
        )

    def _columns(self, row: bytes) -> tuple[str, str]:
        try:
            columns = row.decode().split("\t")
        except UnicodeDecodeError as error:
            raise BadRowError("row is not UTF-8", f"{row[:60]!r}: {error.reason} at byte {error.start}") from None
        if len(columns) <= max(self._caption, self._image):
            raise BadRowError(
                "columns missing",
                f"{len(columns)} columns in {row[:60]!r}; {max(self._caption, self._image) + 1} needed",
            )
        return columns[self._caption], columns[self._image]

    def _lines(self, offset: int) -> Iterator[tuple[int, bytes]]:
        with self._path.open("rb") as file:
            file.seek(offset)
            while line := file.readline(_MAX_LINE_BYTES):
                if len(line) == _MAX_LINE_BYTES:
                    raise DataError(f"{self.name} has no line end within 1 MiB from byte {offset}; is it a text file?")
                if line.strip():
                    yield offset, line.rstrip(b"\r\n")
                offset += len(line)
