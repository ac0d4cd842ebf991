"""COCO captions and instances: one sample an image, with all its captions and the objects in it."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from shellv_core.data.samples import Sample, SampleObject
from shellv_core.data.sources.base import BadRowError, Cursor, Mark, Source
from shellv_core.data.sources.blobs import cached, local_copy
from shellv_core.data.sources.checks import (
    checked_captions,
    checked_object,
    conversations_about,
    id_of,
    identity_of,
    sample_of,
)
from shellv_core.data.sources.config import CocoSource
from shellv_core.data.sources.images import open_images
from shellv_core.data.sources.json_rows import iterate_lists
from shellv_core.errors import DataError
from shellv_core.progress import progress

_TABLES = """
CREATE TABLE images (position INTEGER PRIMARY KEY, id UNIQUE, file_name);  -- positions from 1
CREATE TABLE captions (image_id, caption);
CREATE TABLE categories (id PRIMARY KEY, name) WITHOUT ROWID;
CREATE TABLE objects (image_id, category_id);
"""
_INDEXES = "CREATE INDEX captions_of ON captions (image_id); CREATE INDEX objects_of ON objects (image_id);"


class CocoRows(Source):
    """Images of COCO in the order of the captions' file; a cursor is an image's position there.

    Its files list images and annotations apart, so they are joined once in a database below the project folder's cache.

    Raises:
        DataError: if a file is not COCO's, or names an image or a category that it does not list.
    """

    def __init__(self, config: CocoSource) -> None:
        self.name, self.prefix, self._images = config.captions, config.prefix, open_images(config.images)
        addresses = [config.captions, *filter(None, [config.instances])]
        files = [(address, local_copy(address)) for address in addresses]
        key = []
        for address, path in files:
            if not path.is_file():
                raise DataError(f"{address!r} is not a file; give COCO's annotations.")
            status = path.stat()
            key += [str(path.absolute()), str(status.st_size), str(status.st_mtime_ns)]
        self._database = cached(key, "coco", lambda copy: _join(copy, files[0], files[1] if files[1:] else None))

    def scan(self) -> Iterator[Mark]:
        """Yield a mark for every image; see `Source`."""
        for position, row in enumerate(self.rows(0)):
            name = self.image_name(row)
            says = identity_of([row["id"], name, row["captions"]])
            yield Mark(position, says, b"" if name is None else self._images.stamp(name))

    def rows(self, cursor: Cursor) -> Iterator[Any]:
        """Yield {id, file_name, captions, objects: [[category, count]]} from the position `cursor` on."""
        connection = sqlite3.connect(f"{self._database.as_uri()}?mode=ro", uri=True)
        try:
            images = connection.execute(
                "SELECT id, file_name FROM images WHERE position > ? ORDER BY position", (cursor,)
            )
            for image_id, file_name in images:
                captions = connection.execute(
                    "SELECT caption FROM captions WHERE image_id = ? ORDER BY rowid", (image_id,)
                )
                objects = connection.execute(
                    "SELECT name, count(*) FROM objects JOIN categories ON id = category_id"
                    " WHERE image_id = ? GROUP BY id ORDER BY name",
                    (image_id,),
                )
                yield {
                    "id": image_id,
                    "file_name": json.loads(file_name),
                    "captions": [json.loads(caption) for (caption,) in captions],
                    "objects": [list(item) for item in objects],
                }
        finally:
            connection.close()

    def row_id(self, row: Any) -> str | None:
        """Return the image's id."""
        return id_of(row)

    def image_name(self, row: Any) -> str | None:
        """Return ``file_name``."""
        name = row["file_name"]
        return name if isinstance(name, str) else None

    def sample(self, row: Any, number: int) -> Sample:
        """Return an image with a conversation for each of its captions; see `Source`."""
        name = self.image_name(checked_object(row))
        if name is None:
            raise BadRowError("no image", f"file_name is {row['file_name']!r}")
        captions = checked_captions(row["captions"])
        first, *others = conversations_about(captions, name)
        sample = sample_of(
            {"id": row["id"], "caption": captions[0], "conversations": first},
            key=self.key(number),
            default_id=str(number),
            source=self.name,
            image_name=name,
            read=self._images.read,
        )
        objects = tuple(SampleObject(category, count) for category, count in row["objects"])
        return replace(sample, more_conversations=tuple(others), objects=objects)


def _join(database: Path, captions: tuple[str, Path], instances: tuple[str, Path] | None) -> None:
    connection = sqlite3.connect(database)
    try:
        connection.executescript(f"PRAGMA journal_mode = OFF; PRAGMA synchronous = OFF; {_TABLES}")
        _insert(
            connection,
            captions,
            {
                "images": ("INSERT INTO images (id, file_name) VALUES (?, ?)", ("id", "file_name")),
                "annotations": ("INSERT INTO captions VALUES (?, ?)", ("image_id", "caption")),
            },
        )
        if instances is not None:
            _insert(
                connection,
                instances,
                {
                    "categories": ("INSERT INTO categories VALUES (?, ?)", ("id", "name")),
                    "annotations": ("INSERT INTO objects VALUES (?, ?)", ("image_id", "category_id")),
                },
            )
        connection.executescript(_INDEXES)
        for address, query, listed in (
            (captions[0], "SELECT image_id FROM captions WHERE image_id NOT IN (SELECT id FROM images)", "images"),
            (
                instances and instances[0],
                "SELECT category_id FROM objects WHERE category_id NOT IN (SELECT id FROM categories)",
                "categories",
            ),
        ):
            strangers = connection.execute(f"{query} LIMIT 5").fetchall()
            if strangers:
                raise DataError(
                    f"{address}: annotations name {[item for (item,) in strangers]}, which {listed!r} does not list."
                )
        connection.commit()
    finally:
        connection.close()


def _insert(
    connection: sqlite3.Connection, file: tuple[str, Path], lists: dict[str, tuple[str, tuple[str, str]]]
) -> None:
    """Put two fields of each element of the file's lists into tables."""
    address, path = file
    missing = set(lists)

    def fields(key: str, elements: Iterator[Any], names: tuple[str, str]) -> Iterator[tuple[Any, Any]]:
        for position, element in enumerate(progress(elements, description=f"join {key}", unit="rows")):
            first, second = (element.get(name) if isinstance(element, dict) else None for name in names)
            # A caption or a file name may be anything until its row is checked; ids are numbers or texts.
            unchecked = names[1] in ("file_name", "caption")
            kind = str if key == "categories" else int | str
            if not isinstance(first, int | str) or not (unchecked or isinstance(second, kind)):
                raise DataError(f"{address} is not COCO's: {key} row {position} lacks {' or '.join(names)}.")
            yield first, json.dumps(second) if unchecked else second

    def handle(key: str, elements: Iterator[Any]) -> bool:
        if key in missing:
            missing.discard(key)
            statement, names = lists[key]
            try:
                connection.executemany(statement, fields(key, elements, names))
            except sqlite3.Error as error:
                raise DataError(f"{address} is not COCO's: {key}: {error}.") from None
        return bool(missing)

    iterate_lists(path, handle, address)
    if missing:
        raise DataError(f"{address} is not COCO's: it has no list {' and no list '.join(sorted(missing))}.")
