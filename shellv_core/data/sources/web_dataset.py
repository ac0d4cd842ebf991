"""WebDataset tars: files of one stem, one behind the other, are a sample."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any, cast

from shellv_core.data.samples import Conversation, Sample, SampleObject
from shellv_core.data.sources.base import BadRowError, Cursor, Mark, Source
from shellv_core.data.sources.blobs import Blob, find_files, open_blob
from shellv_core.data.sources.checks import (
    check_image_tokens,
    check_unicode,
    checked_captions,
    checked_object,
    checked_turns,
    id_of,
    identity_of,
    printable,
    sample_of,
)
from shellv_core.data.sources.config import WebDatasetSource
from shellv_core.data.sources.folder import IMAGE_SUFFIXES
from shellv_core.data.sources.tars import tar_members

_TEXTS = ("json", "txt")
_MAX_TEXT_BYTES = 16 << 20


class WebDatasetRows(Source):
    """Samples of tars in the order of the tars' names; a cursor is [tar, byte offset of its first member].

    A row holds the sample's texts and where its images lie. Other members than ``json``, ``txt`` and images are passed
    over. A key means one sample of one tar, so no two samples are duplicates.

    Raises:
        DataError: if there is no tar.
    """

    def __init__(self, config: WebDatasetSource) -> None:
        self.name, self.prefix = config.tars, config.prefix
        self._tars = find_files(config.tars, (".tar",), config.pattern)
        self._blobs: dict[int, Blob] = {}

    def scan(self) -> Iterator[Mark]:
        """Yield a mark for every sample; images are passed over."""
        for row in self.rows([0, 0]):
            says = identity_of([row["tar"], row["key"], {name: text.hex() for name, text in row["texts"].items()}])
            yield Mark(row["at"], says, self._blob(row["at"][0]).version.encode())

    def rows(self, cursor: Cursor) -> Iterator[Any]:
        """Yield {at, tar, key, texts: {suffix: bytes}, images: [[member, offset, size]]} from `cursor` on."""
        first, offset = cast(list[int], cursor)
        for number in range(first, len(self._tars)):
            yield from self._samples(number, offset if number == first else 0)

    def row_id(self, row: Any) -> str | None:
        """Return the record's id, or the key."""
        try:
            found = id_of(_record(row))
        except BadRowError:
            found = None
        return printable(row["key"]) if found is None else found

    def image_name(self, row: Any) -> str | None:
        """Return what the record calls the image (shards of this project), else the member's name behind the tar's."""
        if not row["images"]:
            return None
        try:
            name = _record(row).get("image_source")
        except BadRowError:
            name = None
        return name if isinstance(name, str) else f"{row['tar']}/{row['images'][0][0]}"

    def sample(self, row: Any, number: int) -> Sample:
        """Return what the sample's texts say, and its image; see `Source`."""
        record = _record(row)
        check_unicode(row["key"])
        if len(row["images"]) > 1:
            raise BadRowError("image is not one path", f"{[image[0] for image in row['images']]}; one is supported")
        if not record.get("conversations"):
            record = {"id": record.get("id"), "caption": _caption(row, record)}
            if not row["images"]:
                raise BadRowError("no image", f"{row['tar']} holds none for {row['key']!r}")
        more, tasks, objects = _more(record, bool(row["images"]))
        sample = sample_of(
            record,
            key=self.key(number),
            default_id=row["key"],
            source=self.name,
            image_name=self.image_name(row),
            read=lambda _: self._read(row),
        )
        return replace(sample, more_conversations=more, tasks=tasks, objects=objects)

    def _read(self, row: Any) -> bytes:
        name, offset, size = row["images"][0]
        data = self._blob(row["at"][0]).read_at(offset, size)
        if len(data) != size:
            raise BadRowError("image file unreadable", f"{name!r}: {row['tar']} has changed and is shorter now")
        return data

    def _blob(self, number: int) -> Blob:
        if number not in self._blobs:
            self._blobs[number] = open_blob(self._tars[number][1])
        return self._blobs[number]

    def _samples(self, number: int, start: int) -> Iterator[dict[str, Any]]:
        row: dict[str, Any] = {}
        for member, file in tar_members(self._blob(number), start):
            folder, slash, base = member.name.rpartition("/")
            stem, _, suffix = base.partition(".")
            if not stem or not suffix:
                continue
            key, suffix = folder + slash + stem, suffix.lower()
            if not row or key != row["key"]:
                if row:
                    yield row
                tar = self._tars[number][0]
                row = {"at": [number, member.offset], "tar": tar, "key": key, "texts": {}, "images": []}
            if suffix in _TEXTS and member.size <= _MAX_TEXT_BYTES:
                file.seek(member.offset_data)
                row["texts"][suffix] = file.read(member.size)
            elif f".{suffix}" in IMAGE_SUFFIXES:
                row["images"].append([base, member.offset_data, member.size])
        if row:
            yield row


def _record(row: Any) -> Mapping[str, Any]:
    """Return the JSON member, {} where there is none."""
    text = row["texts"].get("json")
    if text is None:
        return {}
    try:
        return checked_object(json.loads(text))
    except (ValueError, RecursionError) as error:
        raise BadRowError("record unreadable", f"{row['key']}.json: {error}") from None


def _caption(row: Any, record: Mapping[str, Any]) -> str:
    if "txt" not in row["texts"]:
        found = record.get("caption", record.get("text"))
        return checked_captions([] if found is None else [found])[0]
    try:
        return checked_captions([row["texts"]["txt"].decode("utf-8-sig")])[0]
    except UnicodeDecodeError as error:
        raise BadRowError("row is not UTF-8", f"{row['key']}.txt: {error.reason} at byte {error.start}") from None


def _more(
    record: Mapping[str, Any], has_image: bool
) -> tuple[tuple[Conversation, ...], tuple[str, ...], tuple[SampleObject, ...]]:
    """Return what only this project's own shards hold: further conversations, tasks, objects."""
    try:
        more = tuple(checked_turns(turns) for turns in record.get("more_conversations") or ())
        tasks = tuple(str(task) for task in record.get("tasks") or ())
        objects = tuple(SampleObject(**item) for item in record.get("objects") or ())
    except TypeError as error:
        raise BadRowError("record unreadable", f"more_conversations, tasks or objects: {error}") from None
    if not all(_is_object(item) for item in objects):
        raise BadRowError("record unreadable", f"objects: {str(record['objects'])[:60]!r}")
    for conversation in more:
        check_image_tokens(conversation, has_image)
    if tasks and len(tasks) != 1 + len(more):
        raise BadRowError("record unreadable", f"{len(tasks)} tasks for {1 + len(more)} conversations")
    return more, tasks, objects


def _is_object(item: SampleObject) -> bool:
    texts = isinstance(item.category, str) and all(
        each is None or isinstance(each, str) for each in (item.color, item.event)
    )
    return texts and isinstance(item.count, int) and 0 < item.count < 1 << 31
