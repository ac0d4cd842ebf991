"""Parquet and Arrow files, alone, in folders, and as Hugging Face's `datasets` writes them."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, cast

from shellv_core.data.samples import Sample
from shellv_core.data.sources.base import BadRowError, Cursor, Mark, Source
from shellv_core.data.sources.blobs import Blob, cached, find_files, local, open_blob
from shellv_core.data.sources.checks import (
    check_unicode,
    checked_captions,
    checked_turns,
    conversations_about,
    id_of,
    identity_of,
    sample_of,
)
from shellv_core.data.sources.config import ParquetSource
from shellv_core.data.sources.images import ImageStore, open_images
from shellv_core.errors import DataError
from shellv_core.storage import download

if TYPE_CHECKING:
    import pyarrow as pa

_SUFFIXES = (".parquet", ".arrow")
_BATCH_ROWS = 64  # with images' bytes
_SCAN_BATCH_ROWS = 4096
_SPLIT = re.compile("(?:^|[-_/])(train|validation|valid|val|dev|test)(?=[-_./]|$)")
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"


class ParquetRows(Source):
    """Rows of tables; a cursor is [file, row group or record batch, row in it].

    A row is {at, id, image, captions, conversations}. Rows whose image stands in the table are never duplicates of each
    other: their path, where they have one, is often the same in all rows, and their bytes are not read in `scan`.

    Raises:
        DataError: if there is no such file, or files of several splits and no `pattern`.
    """

    def __init__(self, config: ParquetSource) -> None:
        self.name, self.prefix, self._config = config.files, config.prefix, config
        self._files = _data_files(config.files, config.pattern)
        self._blobs: dict[int, Blob] = {}
        self._images: ImageStore | None = None if config.images is None else open_images(config.images)

    def scan(self) -> Iterator[Mark]:
        """Yield a mark for every row; the bytes of images are not read."""
        for row in self._rows([0, 0, 0], scan=True):
            name, stamp = row["image"], b""
            says = [row["id"], row["captions"], row["conversations"]]
            if row["embedded"]:
                says += [self._files[row["at"][0]][0], row["at"][1:]]
                stamp = self._blob(row["at"][0]).version.encode()
            elif name is not None:
                says.append(name)
                stamp = self._stored().stamp(name)
            yield Mark(row["at"], identity_of(says), stamp)

    def rows(self, cursor: Cursor) -> Iterator[Any]:
        """Yield the rows from `cursor` on, their images' bytes included."""
        return self._rows(cast(list[int], cursor), scan=False)

    def row_id(self, row: Any) -> str | None:
        """Return the id column's value."""
        return id_of(row)

    def image_name(self, row: Any) -> str | None:
        """Return the path in `images`; for an image in the table its place there, and its path if it has one."""
        image = row["image"]
        if image is None or isinstance(image, str):
            return image
        file, group, number = row["at"]
        place = f"{self._files[file][0]}:{group}:{number}"
        path = image.get("path") if isinstance(image, dict) else None
        return f"{place}:{path}" if path else place

    def sample(self, row: Any, number: int) -> Sample:
        """Return `row` and its image; see `Source`."""
        name = self.image_name(row)
        captions = [] if row["captions"] is None else row["captions"]
        captions = captions if isinstance(captions, list) else [captions]
        captions = checked_captions(captions) if captions else []
        more: tuple[Any, ...] = ()
        if row["conversations"]:
            conversations = checked_turns(_turns(row["conversations"]))
        elif name is None:
            raise BadRowError("no image", f"the column {self._config.image_column!r} is empty")
        else:
            conversations, *others = conversations_about(checked_captions(captions), name)
            more = tuple(others)
        sample = sample_of(
            {"id": row["id"], "conversations": conversations, "caption": captions[0] if captions else None},
            key=self.key(number),
            default_id=str(number),
            source=self.name,
            image_name=name,
            read=lambda _: self._read(row["image"]),
        )
        return replace(sample, more_conversations=more)

    def _read(self, image: Any) -> bytes:
        if isinstance(image, str):
            return self._stored().read(image)
        data = image.get("bytes") if isinstance(image, dict) else image
        if isinstance(data, list):
            raise BadRowError("image is not one path", f"{len(data)} images; one a row is supported")
        if not isinstance(data, bytes):
            raise BadRowError("no image", "no bytes in the table; set the source's `images` if its paths lead to files")
        return data

    def _stored(self) -> ImageStore:
        return cast(ImageStore, self._images)  # _columns has seen to it

    def _blob(self, number: int) -> Blob:
        if number not in self._blobs:
            self._blobs[number] = open_blob(self._files[number][1])
        return self._blobs[number]

    def _rows(self, cursor: list[int], scan: bool) -> Iterator[dict[str, Any]]:
        import pyarrow as pa

        first, first_group, first_row = cursor
        for number in range(first, len(self._files)):
            name, address = self._files[number]
            start = (first_group, first_row) if number == first else (0, 0)
            table = _ParquetTable if name.endswith(".parquet") else _ArrowTable
            try:
                opened = table(self._blob(number))
                columns, embedded = self._columns(opened.schema, address)
                if scan and embedded:
                    columns.pop("image", None)
                for group, row, batch in opened.batches(start[0], columns, _SCAN_BATCH_ROWS if scan else _BATCH_ROWS):
                    skip = max(start[1] - row, 0) if group == start[0] else 0
                    for position, values in enumerate(batch.slice(skip).to_pylist(), row + skip):
                        yield {"at": [number, group, position], "embedded": embedded, **_FIELDS, **values}
            except (pa.ArrowException, OSError) as error:
                raise DataError(f"{address} is not a whole Parquet or Arrow file ({error}). Fetch it again.") from None

    def _columns(self, schema: pa.Schema, address: str) -> tuple[dict[str, list[str]], bool]:
        """Return field of a row -> path of its column, and whether the table holds the images' bytes."""
        import pyarrow as pa

        config = self._config
        captions = [each for each in config.caption_columns if each in schema.names][:1]
        wanted = {
            "id": config.id_column,
            "image": config.image_column,
            "conversations": config.conversations_column,
            "captions": captions[0] if captions else "",
        }
        columns = {field: [name] for field, name in wanted.items() if name in schema.names}
        if "captions" not in columns and "conversations" not in columns:
            raise DataError(
                f"{address} has neither the column {config.conversations_column!r} nor one of"
                f" {list(config.caption_columns)}; it has {schema.names}. Set caption_columns or conversations_column."
            )
        if "image" not in columns:
            return columns, False
        kind = schema.field(config.image_column).type
        if pa.types.is_string(kind) or pa.types.is_large_string(kind):
            if self._images is None:
                raise DataError(
                    f"{address}: {config.image_column!r} holds paths; set the source's `images` to their folder."
                )
            return columns, False
        if self._images is not None and pa.types.is_struct(kind) and kind.get_field_index("path") >= 0:
            columns["image"].append("path")
            return columns, False
        return columns, True


#: A row before its columns are laid over it.
_FIELDS: Mapping[str, Any] = {"id": None, "image": None, "captions": None, "conversations": None}


class _ParquetTable:
    """A Parquet file as record batches, one row group after the other."""

    def __init__(self, blob: Blob) -> None:
        import pyarrow.parquet as pq

        self._file = pq.ParquetFile(blob.open(), pre_buffer=False)
        self.schema: pa.Schema = self._file.schema_arrow

    def batches(
        self, first_group: int, columns: Mapping[str, list[str]], size: int
    ) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        """Yield (row group, row in it, batch of the fields `columns`) from the row group `first_group` on."""
        paths = [".".join(path) for path in columns.values()]
        for group in range(first_group, self._file.num_row_groups):
            row = 0
            for batch in self._file.iter_batches(size, row_groups=[group], columns=paths, use_threads=False):
                yield group, row, _picked(batch, columns)
                row += batch.num_rows


class _ArrowTable:
    """An Arrow file or stream (what `datasets` keeps on disk) as record batches, mapped into memory."""

    def __init__(self, blob: Blob) -> None:
        import pyarrow as pa

        path = local(blob.address)
        if path is None:
            path = cached([blob.address, blob.version], "arrow", lambda copy: download(blob.address, copy))
        source = pa.memory_map(str(path))
        self._file: Any = None
        self._stream: Any = None
        if source.read(6) == b"ARROW1":
            self._file = pa.ipc.open_file(source)
        else:
            source.seek(max(source.size() - len(_END_OF_STREAM), 0))
            if source.read() != _END_OF_STREAM:
                raise pa.ArrowInvalid("it is cut off: the mark of its end is missing")
            source.seek(0)
            self._stream = pa.ipc.open_stream(source)
        self.schema: pa.Schema = (self._file or self._stream).schema

    def batches(
        self, first_group: int, columns: Mapping[str, list[str]], size: int
    ) -> Iterator[tuple[int, int, pa.RecordBatch]]:
        """Yield (record batch, row in it, part of it with the fields `columns`) from `first_group` on."""
        for group, whole in enumerate(self._all()):
            if group >= first_group:
                for row in range(0, whole.num_rows, size):
                    yield group, row, _picked(whole.slice(row, size), columns)

    def _all(self) -> Iterator[pa.RecordBatch]:
        if self._file is None:
            yield from self._stream
        else:
            yield from (self._file.get_batch(number) for number in range(self._file.num_record_batches))


def _picked(batch: pa.RecordBatch, columns: Mapping[str, list[str]]) -> pa.RecordBatch:
    import pyarrow as pa
    import pyarrow.compute as pc

    arrays = [
        pc.struct_field(batch.column(path[0]), path[1:]) if path[1:] else batch.column(path[0])
        for path in columns.values()
    ]
    return pa.RecordBatch.from_arrays(arrays, names=list(columns))


def _data_files(address: str, pattern: str) -> list[tuple[str, str]]:
    """Return (name, address) of the tables; of a folder of `save_to_disk` those that its state lists."""
    files = [
        item for item in find_files(address, _SUFFIXES, pattern) if not PurePosixPath(item[0]).name.startswith("cache-")
    ]
    splits = {match[1] for name, _ in files if (match := _SPLIT.search(name))}
    if len(splits) > 1 and pattern == "*":
        raise DataError(
            f"{address!r} holds several splits ({', '.join(sorted(splits))}); choose one by `pattern`, such as train*."
        )
    return files


def _turns(found: Any) -> Any:
    """Return a conversations column's value as a list; it may be written as JSON."""
    if not isinstance(found, str):
        return found
    try:
        turns = json.loads(found)
    except (ValueError, RecursionError) as error:
        raise BadRowError("record unreadable", f"conversations: {error}") from None
    check_unicode(json.dumps(turns, ensure_ascii=False))
    return turns
