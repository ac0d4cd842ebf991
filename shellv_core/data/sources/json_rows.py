"""JSON files of any size, one value in memory at a time, each with the place where it begins."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO, cast

from shellv_core.errors import DataError

_CHUNK_BYTES = 1 << 20
_MAX_ROW_BYTES = 64 << 20
_BETWEEN = re.compile(r"[\s,]*")
_SPACE = re.compile(r"\s*")
# Anything else after a value may be a number that goes on in the next chunk.
_AFTER_VALUE = frozenset(", \t\r\n]}")


def iterate_rows(path: Path, start: int = 0, number: int = 0, name: str = "") -> Iterator[tuple[int, Any]]:
    """Yield the values of a JSON list, or JSON objects one after the other (JSON Lines), each with its byte offset.

    Args:
        path: the file, UTF-8 with or without a byte-order mark.
        start: an offset that was yielded before, 0 for the first row.
        number: of the row at `start`, for errors.
        name: of the file, for errors; by default its path.

    Raises:
        DataError: if the file holds neither, or is damaged; earlier rows have been yielded by then.
    """
    with path.open("rb") as file:
        text = _Text(file, name or str(path))
        text.skip(_SPACE)
        opening = text.peek()
        if opening not in ("[", "{"):
            raise DataError(
                f"{text.name} begins with {text.rest(20)!r}; a JSON list of rows or one JSON object a line is expected."
            )
        if start:
            text.seek(start)
        elif opening == "[":
            text.advance(1)
        yield from text.values(number, "]" if opening == "[" else "")
        if opening == "[":
            text.skip(_SPACE)
            if text.peek():
                raise DataError(f"{text.name} goes on with {text.rest(20)!r} behind its list's end; make it one list.")


def iterate_lists(path: Path, handle: Callable[[str, Iterator[Any]], bool], name: str = "") -> None:
    """Pass over a JSON object whose values are lists, one element in memory at a time.

    Args:
        path: the file.
        handle: called with each key and the elements of its list; returns whether the rest of the file is of use. What
            it leaves of the elements is passed over. Values that are no lists are passed over too.
        name: of the file, for errors; by default its path.

    Raises:
        DataError: if the file does not hold an object, or is damaged.
    """
    with path.open("rb") as file:
        text = _Text(file, name or str(path))
        text.skip(_SPACE)
        if text.peek() != "{":
            raise DataError(f"{text.name} begins with {text.rest(20)!r}; a JSON object of lists is expected.")
        text.advance(1)
        while True:
            text.skip(_BETWEEN)
            if text.peek() == "}":
                return
            key = text.value("the object's next key")
            text.skip(_SPACE)
            if not isinstance(key, str) or text.peek() != ":":
                raise DataError(
                    f"{text.name} is damaged: {str(key)[:40]!r} stands where a key and a colon are expected."
                )
            text.advance(1)
            text.skip(_SPACE)
            if text.peek() != "[":
                text.value(f"{key!r}")
                continue
            text.advance(1)
            elements = (value for _, value in text.values(0, "]", f" of {key!r}"))
            if not handle(key, elements):
                return
            for _ in elements:
                pass


class _Text:
    """The decoded text of a file, a chunk at a time, with a position that is known in bytes too."""

    def __init__(self, file: BinaryIO, name: str) -> None:
        self._file, self.name, self._decoder = file, name, json.JSONDecoder()
        self.seek(0)
        if self._file.read(3) != codecs.BOM_UTF8:
            self.seek(0)
        else:
            self._offset = 3

    def seek(self, offset: int) -> None:
        self._file.seek(offset)
        self._utf8 = codecs.getincrementaldecoder("utf-8")()
        self._text, self._position, self._offset, self._ascii = "", 0, offset, True

    def advance(self, characters: int) -> None:
        end = self._position + characters
        self._offset += characters if self._ascii else len(self._text[self._position : end].encode())
        self._position = end

    def peek(self) -> str:
        if self._position == len(self._text):
            self._more("")
        return self._text[self._position : self._position + 1]

    def rest(self, characters: int) -> str:
        return self._text[self._position : self._position + characters]

    def skip(self, pattern: re.Pattern[str]) -> None:
        while True:
            # Both patterns match nothing at all, too.
            match = cast(re.Match[str], pattern.match(self._text, self._position))
            self.advance(match.end() - self._position)
            if self._position < len(self._text) or not self._more(""):
                return

    def values(self, number: int, end: str, place: str = "") -> Iterator[tuple[int, Any]]:
        """Yield (byte offset, value) up to the character `end`, or the file's end where it is empty."""
        while True:
            self.skip(_BETWEEN)
            following = self.peek()
            if following == end:
                self.advance(len(end))
                return
            where = f"row {number}{place}"
            if not following:
                raise DataError(f"{self.name} is damaged at {where}: the list has no end.")
            offset = self._offset
            yield offset, self.value(where)
            number += 1

    def value(self, where: str) -> Any:
        while True:
            try:
                value, end = self._decoder.raw_decode(self._text, self._position)
            except json.JSONDecodeError as error:
                before = len(self._text[self._position : error.pos].encode())
                problem = f"{error.msg} at byte {self._offset + before}"
            except RecursionError:
                raise DataError(f"{self.name} is damaged at {where}: it is nested too deeply.") from None
            else:
                if self._text[end : end + 1] in _AFTER_VALUE or (isinstance(value, dict | list | str)):
                    self.advance(end - self._position)
                    return value
                problem = "the list has no end"
            if len(self._text) - self._position > _MAX_ROW_BYTES:
                raise DataError(f"{self.name} is damaged at {where}: {problem}, and it is longer than 64 MiB.")
            if not self._more(where):
                raise DataError(f"{self.name} is damaged at {where}: {problem}.")

    def _more(self, where: str) -> bool:
        """Read on, at least as much as there is, so that a long value is not parsed often; False at the end."""
        held = self._text[self._position :]
        data = self._file.read(max(_CHUNK_BYTES, len(held)))
        try:
            text = self._utf8.decode(data, final=not data)
        except UnicodeDecodeError as error:
            at = where or f"byte {self._file.tell() - len(data) + error.start}"
            raise DataError(f"{self.name} is damaged at {at}: it is not UTF-8 ({error.reason}).") from None
        self._text, self._position = held + text, 0
        self._ascii = self._text.isascii()
        return bool(data)
