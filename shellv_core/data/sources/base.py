"""What a source of rows is, and the address of a row that cannot be used.

A source is read twice: `scan` passes over it once, cheaply and in order, so that a plan can cut it into units; `rows`
then gives any unit's rows without reading those before it. Neither keeps more than one row in memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shellv_core.data.samples import Sample

#: Where a row begins in its source: a JSON value that only the source understands, such as a byte offset.
Cursor = int | str | list[int]


#: Every reason for which a row is refused, and what to do about it.
REASONS: Mapping[str, str] = {
    "row is not an object": "the list holds something else than {...}; mend the file",
    "row is not UTF-8": "the line is in another encoding; convert the file",
    "text is not Unicode": "the row holds half of a surrogate pair; write the character again",
    "columns missing": "the line has fewer columns than the settings name",
    "record unreadable": "the sample's JSON member is not a JSON object",
    "duplicate row": "the row says what an earlier row says about the same image",
    "no conversation": "the row has neither a conversation nor a caption to make one of",
    "turn is not {from, value}": "each turn needs a text `value` and a `from`",
    "roles do not alternate human, gpt": "a conversation is question, answer, question, answer...",
    "empty answer": "an answer without text teaches nothing",
    "image token without image": "the conversation asks about an image that the row does not name",
    "not exactly one image token": "one human turn shows the image, once",
    "no image": "rows of this format are about an image",
    "image is not one path": "one image a row is supported",
    "image path leaves the image folder": "paths are relative, without `..`; a URL must be downloaded first",
    "image file missing": "nothing of that name is in the folder or archive",
    "image file unreadable": "the file is there and cannot be read",
    "image truncated or corrupt": "the image does not decode to its end; fetch it again",
    "image too large": "scale the image down",
    "image format not supported": "convert the image to JPEG or PNG",
    "no caption": "the image has no caption, or an empty one",
    "caption is not a text": "the caption is a number, a list or the like",
    "hallucinated captions are not [{type, text}]": "see `HallucinatedCaption` for the types",
}


@dataclass(frozen=True)
class Mark:
    """One row as `Source.scan` sees it.

    Attributes:
        cursor: from here `Source.rows` can begin.
        identity: 16 bytes, equal for rows that say the same about the same image.
        stamp: changes when the row's image does, as far as that can be told without reading it (size and modification
            time of a local file); empty where it cannot.
    """

    cursor: Cursor
    identity: bytes
    stamp: bytes = b""


@dataclass(frozen=True)
class RejectedRow:
    """The address of a bad row and what is wrong with it.

    Attributes:
        source: the file or folder that the row stands in.
        row: position in it, from 0.
        key: the row's id where it has one.
        reason: one of `REASONS`, to be counted.
        detail: what was found in this row.
    """

    source: str
    row: int
    key: str | None
    reason: str
    detail: str

    def __str__(self) -> str:
        named = "" if self.key is None else f" (id {self.key!r})"
        return f"{self.source} row {self.row}{named}: {self.reason}: {self.detail}"


class BadRowError(Exception):
    """A row cannot be used; becomes a `RejectedRow` with the row's address."""

    def __init__(self, reason: str, detail: str) -> None:
        assert reason in REASONS, reason  # noqa: S101
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class Source(ABC):
    """Rows of one format.

    Attributes:
        name: what the rows' provenance says, the address as the user gave it.
        prefix: begins the keys of its samples; letters and ``_`` only.
        remote: whether reading an image waits for a network.
    """

    name: str
    prefix: str
    remote: bool = False

    @abstractmethod
    def scan(self) -> Iterator[Mark]:
        """Yield a mark for every row in order, bad ones included.

        Raises:
            DataError: if the source as a whole cannot be read (not the format, damaged); marks before the damage have
                been yielded by then.
        """

    @abstractmethod
    def rows(self, cursor: Cursor) -> Iterator[Any]:
        """Yield the rows from `cursor` on, parsed but unchecked, in the order of `scan`."""

    @abstractmethod
    def row_id(self, row: Any) -> str | None:
        """Return the id that `row` carries in its source, None if it has none."""

    @abstractmethod
    def image_name(self, row: Any) -> str | None:
        """Return what the source calls the image of `row`: equal for rows about one image; None if it has none."""

    @abstractmethod
    def sample(self, row: Any, number: int) -> Sample:
        """Check `row`, number `number` of the source, read and verify its image, and return both as a sample.

        Safe to call from several threads.

        Raises:
            BadRowError: if the row or its image cannot be used.
        """

    def key(self, number: int) -> str:
        """Return the key of the sample made of row `number`."""
        return f"{self.prefix}-{number:09d}"

    def read(self, row: Any, number: int) -> Sample | RejectedRow:
        """Return `sample(row, number)`, or the address and reason if the row cannot be used."""
        try:
            return self.sample(row, number)
        except BadRowError as error:
            return RejectedRow(self.name, number, self.row_id(row), error.reason, error.detail)
