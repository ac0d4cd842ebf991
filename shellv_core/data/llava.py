"""LLaVA-format data: a JSON list of rows beside a folder of images.

Every row is checked, its image decoded in full, before its bytes go on untouched. A bad row is returned with its
address and a reason, never dropped in silence.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Literal

from shellv_core.data.samples import HALLUCINATION_TYPES, IMAGE_TOKEN, Conversation, HallucinatedCaption, Sample
from shellv_core.errors import DataError, ObjectNotFoundError
from shellv_core.storage import join, read_bytes

_CHUNK_CHARACTERS = 1 << 20
_AFTER_ELEMENT = tuple(", \t\r\n]")
_FORMATS: dict[str, Literal["jpg", "png"]] = {"JPEG": "jpg", "PNG": "png"}

# HACL's keys for a true and a hallucinated caption (X-PLUG/mPLUG-HalOwl).
_HACL_CAPTION, _HACL_HALLUCINATION = "text", "Hallucination caption"


@dataclass(frozen=True)
class RejectedRow:
    """The address of a bad row and what is wrong with it.

    Attributes:
        source: The annotation file.
        row: Position in its list, from 0.
        key: The row's id where it has one.
        reason: One of a fixed set of phrases, to be counted.
        detail: What was found in this row.
    """

    source: str
    row: int
    key: str | None
    reason: str
    detail: str

    def __str__(self) -> str:
        named = "" if self.key is None else f" (id {self.key!r})"
        return f"{self.source} row {self.row}{named}: {self.reason}: {self.detail}"


class _BadRowError(Exception):
    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


class ImageFolder:
    """Images by relative name, on the local disk or below a URI.

    Args:
        address: A local path, or an ``s3://`` or ``file://`` URI.
    """

    def __init__(self, address: str) -> None:
        self._uri = address if "://" in address else None
        self._path = Path(address)

    def read(self, name: str) -> bytes:
        """Return the bytes of image `name`, or raise `_BadRowError`."""
        parts = PurePosixPath(name).parts
        if not parts or name.startswith(("/", "\\")) or ".." in parts or "://" in name or "\0" in name:
            raise _BadRowError("image path leaves the image folder", repr(name))
        try:
            return read_bytes(join(self._uri, name)) if self._uri else (self._path / name).read_bytes()
        except (FileNotFoundError, ObjectNotFoundError, IsADirectoryError, NotADirectoryError):
            raise _BadRowError("image file missing", repr(name)) from None

    def stamp(self, name: str) -> tuple[int, int] | None:
        """Return size and modification time of a local image, None where there is none or the folder is remote."""
        if self._uri:
            return None
        try:
            status = (self._path / name).stat()
        except (OSError, ValueError):
            return None
        return status.st_size, status.st_mtime_ns


def iterate_json_list(path: Path) -> Iterator[Any]:
    """Yield the elements of a JSON list from a file of any size.

    Raises:
        DataError: if the file does not hold a list, or is damaged; earlier elements have been yielded by then.
    """
    decoder = json.JSONDecoder()
    with path.open(encoding="utf-8-sig") as file:
        text, position, number = file.read(_CHUNK_CHARACTERS).lstrip(), 1, 0
        if not text.startswith("["):
            raise DataError(f"{path} begins with {text[:20]!r}; a JSON list of LLaVA rows is expected.")
        while True:
            while position < len(text) and (text[position].isspace() or (number and text[position] == ",")):
                position += 1
            if text.startswith("]", position):
                return
            problem = "the list has no end"
            try:
                element, end = decoder.raw_decode(text, position)
            except json.JSONDecodeError as error:
                problem = str(error)
            else:
                # Anything else after an element may be a number that goes on in the next chunk.
                if text[end : end + 1] in _AFTER_ELEMENT:
                    yield element
                    position, number = end, number + 1
                    continue
            more = file.read(_CHUNK_CHARACTERS)
            if not more:
                raise DataError(f"{path} is damaged at row {number}: {problem}.")
            text, position = text[position:] + more, 0


def content_stamp(annotations: Path, folder: ImageFolder) -> str:
    """Return a hash (hex) that changes when the rows or the local images do.

    Images count by size and modification time. Images in an object store count by name only: there they are taken as
    immutable.

    Raises:
        DataError: if the file does not hold a JSON list.
    """
    digest = hashlib.sha256()
    with annotations.open("rb") as file:
        digest.update(hashlib.file_digest(file, "sha256").digest())
    for row in iterate_json_list(annotations):
        name = row.get("image") if isinstance(row, dict) else None
        if isinstance(name, str):
            digest.update(repr(folder.stamp(name)).encode())
    return digest.hexdigest()


def split_of(sample: Sample, image_name: str | None, validation_fraction: float) -> Literal["train", "validation"]:
    """Return the split of a sample; all rows about one image fall into the same one."""
    digest = hashlib.sha256((image_name or sample.id).encode()).digest()
    return "validation" if int.from_bytes(digest[:8], "big") < validation_fraction * 2**64 else "train"


def row_identity(row: Any) -> bytes:
    """Return a hash under which two rows are duplicates of each other.

    The id alone does not tell: LLaVA's own instruction data holds several conversations about one image under one id.
    """
    if isinstance(row, dict):
        row = {name: row.get(name) for name in ("id", "image", "conversations")}
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).digest()[:16]


def read_row(row: Any, number: int, source: str, folder: ImageFolder, duplicate: bool) -> Sample | RejectedRow:
    """Check row `number` of `source` and return it as a sample, or why it cannot be one.

    Args:
        row: The parsed JSON value.
        number: Its position in the list; it gives the sample's key.
        source: Name of the annotation file.
        folder: Where the images are.
        duplicate: Whether an equal row came before.
    """
    row_id = None
    if isinstance(row, dict) and isinstance(row.get("id"), str | int):
        row_id = str(row["id"])
    try:
        if not isinstance(row, dict):
            raise _BadRowError("row is not an object", f"{type(row).__name__} {str(row)[:60]!r}")
        if duplicate:
            raise _BadRowError("duplicate row", "id, image and conversations equal an earlier row's")
        conversations = _conversations(row)
        image, image_format = _image(row, conversations, folder)
        return Sample(
            key=f"row-{number:09d}",
            id=row_id if row_id is not None else str(number),
            conversations=conversations,
            source=source,
            image=image,
            image_format=image_format,
            caption=_caption(row),
            hallucinated_captions=_hallucinated_captions(row),
        )
    except _BadRowError as error:
        return RejectedRow(source, number, row_id, error.reason, error.detail)


def _conversations(row: Mapping[str, Any]) -> Conversation:
    turns = row.get("conversations")
    if not isinstance(turns, list) or not turns:
        raise _BadRowError("no conversation", f"conversations is {str(turns)[:60]!r}")
    checked: Conversation = []
    for position, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise _BadRowError("turn is not {from, value}", f"turn {position} is {str(turn)[:60]!r}")
        expected = ("human", "gpt")[position % 2]
        if turn.get("from") != expected:
            raise _BadRowError(
                "roles do not alternate human, gpt", f"turn {position} is from {turn.get('from')!r}, not {expected!r}"
            )
        checked.append({"from": expected, "value": turn["value"]})
    if len(checked) % 2:
        raise _BadRowError("roles do not alternate human, gpt", "the last human turn has no answer")
    if not all(turn["value"].strip() for turn in checked if turn["from"] == "gpt"):
        raise _BadRowError("empty answer", "a gpt turn has no text")
    return checked


def _image(
    row: Mapping[str, Any], conversations: Conversation, folder: ImageFolder
) -> tuple[bytes | None, Literal["jpg", "png"]]:
    name = row.get("image")
    tokens = sum(turn["value"].count(IMAGE_TOKEN) for turn in conversations)
    if name is None:
        if tokens:
            raise _BadRowError("image token without image", f"{tokens} {IMAGE_TOKEN} but no image")
        return None, "jpg"
    if not isinstance(name, str):
        raise _BadRowError("image is not one path", f"{str(name)[:60]!r}; exactly one image a row is supported")
    asked = sum(turn["value"].count(IMAGE_TOKEN) for turn in conversations if turn["from"] == "human")
    if tokens != 1 or asked != 1:
        raise _BadRowError(
            "not exactly one image token", f"{tokens} {IMAGE_TOKEN}, of which {asked} in human turns, for one image"
        )
    data = folder.read(name)
    return data, _decoded_format(name, data)


def _decoded_format(name: str, data: bytes) -> Literal["jpg", "png"]:
    """Decode an image in full, which is the only way to see that it is whole, and return its format."""
    import io

    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            image.load()
            kind = image.format
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise _BadRowError("image truncated or corrupt", f"{name!r} ({len(data)} bytes): {error}") from None
    if kind not in _FORMATS:
        raise _BadRowError("image format not supported", f"{name!r} is {kind}; convert it to JPEG or PNG")
    return _FORMATS[kind]


def _caption(row: Mapping[str, Any]) -> str | None:
    caption = row.get("caption", row.get(_HACL_CAPTION))
    if caption is not None and not isinstance(caption, str):
        raise _BadRowError("caption is not a text", f"{str(caption)[:60]!r}")
    return caption


def _hallucinated_captions(row: Mapping[str, Any]) -> tuple[HallucinatedCaption, ...]:
    found = row.get("hallucinated_captions")
    if found is None:
        single = row.get(_HACL_HALLUCINATION)
        found = [] if single is None else [{"type": "unspecified", "text": single}]
    if not isinstance(found, list):
        raise _BadRowError("hallucinated captions are not [{type, text}]", f"{str(found)[:60]!r}")
    for item in found:
        known = isinstance(item, dict) and item.get("type") in (*HALLUCINATION_TYPES, "unspecified")
        if not known or not isinstance(item.get("text"), str):
            raise _BadRowError("hallucinated captions are not [{type, text}]", f"{str(item)[:60]!r}")
    return tuple(HallucinatedCaption(item["type"], item["text"]) for item in found)
