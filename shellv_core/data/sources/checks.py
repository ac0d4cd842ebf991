"""What every format asks of a row's conversation, captions and image."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import orjson

from shellv_core.data.samples import HALLUCINATION_TYPES, IMAGE_TOKEN, Conversation, HallucinatedCaption, Sample
from shellv_core.data.sources.base import BadRowError
from shellv_core.data.sources.verify import ImageFormat, verified_image

#: Asked of an image that comes with a caption alone.
CAPTION_INSTRUCTIONS = (
    "Describe this image in one sentence.",
    "Write a short caption for the picture.",
    "Sum up in a few words what can be seen here.",
    "What does this photo show? Answer briefly.",
    "Give the image a concise description.",
    "Put the main content of this picture into one sentence.",
    "How would you caption this image?",
    "Say briefly what is going on in the picture.",
)

# HACL's keys for a true and a hallucinated caption (X-PLUG/mPLUG-HalOwl).
_HACL_CAPTION, _HACL_HALLUCINATION = "text", "Hallucination caption"
_SAYING = ("id", "image", "conversations", "caption", _HACL_CAPTION, "hallucinated_captions", _HACL_HALLUCINATION)


def identity_of(saying: Any) -> bytes:
    """Return 16 bytes of a hash of a JSON value; equal for equal values."""
    try:
        text = orjson.dumps(saying, option=orjson.OPT_SORT_KEYS)
    except TypeError:  # lone surrogates and integers of more than 64 bits
        text = json.dumps(saying, sort_keys=True).encode()
    return hashlib.sha256(text).digest()[:16]


def row_identity(row: Any) -> bytes:
    """Return a hash under which two rows of LLaVA's format are duplicates of each other.

    The id alone does not tell: LLaVA's own instruction data holds several conversations about one image under one id.
    """
    if isinstance(row, dict):
        row = {name: row[name] for name in _SAYING if name in row}
    return identity_of(row)


def checked_object(row: Any) -> Mapping[str, Any]:
    """Return `row` if it is a JSON object whose texts can be written as UTF-8, or raise `BadRowError`."""
    if not isinstance(row, dict):
        raise BadRowError("row is not an object", f"{type(row).__name__} {str(row)[:60]!r}")
    try:
        orjson.dumps(row)
    except TypeError:
        check_unicode(json.dumps(row, ensure_ascii=False))
    return row


def check_unicode(text: str) -> None:
    """Raise `BadRowError` for a text that cannot be written as UTF-8."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise BadRowError(
            "text is not Unicode", f"a lone surrogate: {text[max(error.start - 20, 0) : error.end]!r}"
        ) from None


def sample_of(
    row: Mapping[str, Any],
    *,
    key: str,
    default_id: str,
    source: str,
    image_name: str | None,
    read: Callable[[str], bytes],
) -> Sample:
    """Check a row under LLaVA's, HACL's or this project's keys and return it as a sample.

    Args:
        row: with conversations, or a caption to make one of.
        key: of the sample.
        default_id: id where the row has none.
        source: where the row comes from.
        image_name: what the source calls the image, None for a row of text.
        read: gives the image's bytes, after all else has been checked.

    Raises:
        BadRowError: if the row or its image cannot be used.
    """
    caption = caption_of(row)
    conversations = _conversations(row, caption, image_name)
    check_image_tokens(conversations, image_name is not None)
    lies = hallucinated_captions_of(row)
    image: bytes | None = None
    image_format: ImageFormat = "jpg"
    width = height = 0
    if image_name is not None:
        image = read(image_name)
        image_format, width, height = verified_image(image_name, image)
    row_id = id_of(row)
    return Sample(
        key=key,
        id=default_id if row_id is None else row_id,
        conversations=conversations,
        source=source,
        image=image,
        image_format=image_format,
        caption=caption,
        hallucinated_captions=lies,
        image_source=image_name,
        width=width,
        height=height,
    )


def id_of(row: Any, name: str = "id") -> str | None:
    """Return the row's id, None where it has none."""
    found = row.get(name) if isinstance(row, dict) else None
    return printable(str(found)) if isinstance(found, str | int) else None


def printable(text: str) -> str:
    """Return `text` with ``?`` for what cannot be written as UTF-8."""
    return text.encode("utf-8", "replace").decode()


def _conversations(row: Mapping[str, Any], caption: str | None, image_name: str | None) -> Conversation:
    turns = row.get("conversations")
    if turns or caption is None or not caption.strip():
        return checked_turns(turns)
    if image_name is None:
        raise BadRowError("no image", f"only a caption: {caption[:60]!r}")
    return conversation_about(caption, image_name)


def checked_turns(turns: Any) -> Conversation:
    """Return alternating human and gpt turns, or raise `BadRowError`."""
    if not isinstance(turns, list) or not turns:
        raise BadRowError("no conversation", f"conversations is {str(turns)[:60]!r}")
    checked: Conversation = []
    for position, turn in enumerate(turns):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise BadRowError("turn is not {from, value}", f"turn {position} is {str(turn)[:60]!r}")
        expected = ("human", "gpt")[position % 2]
        if turn.get("from") != expected:
            raise BadRowError(
                "roles do not alternate human, gpt", f"turn {position} is from {turn.get('from')!r}, not {expected!r}"
            )
        checked.append({"from": expected, "value": turn["value"]})
    if len(checked) % 2:
        raise BadRowError("roles do not alternate human, gpt", "the last human turn has no answer")
    if not all(turn["value"].strip() for turn in checked if turn["from"] == "gpt"):
        raise BadRowError("empty answer", "a gpt turn has no text")
    return checked


def check_image_tokens(conversation: Conversation, has_image: bool) -> None:
    """Raise `BadRowError` unless one human turn shows the image once, or none does where there is no image."""
    asked, tokens = (
        sum(turn["value"].count(IMAGE_TOKEN) for turn in conversation if turn["from"] in speakers)
        for speakers in (("human",), ("human", "gpt"))
    )
    if not has_image and tokens:
        raise BadRowError("image token without image", f"{tokens} {IMAGE_TOKEN} but no image")
    if has_image and (tokens != 1 or asked != 1):
        raise BadRowError(
            "not exactly one image token", f"{tokens} {IMAGE_TOKEN}, of which {asked} in human turns, for one image"
        )


def conversation_about(caption: str, image_name: str) -> Conversation:
    """Return a request for a description and `caption` as the answer.

    The request is one of `CAPTION_INSTRUCTIONS`, chosen by a hash of caption and image, so that it never changes.
    """
    if IMAGE_TOKEN in caption:
        raise BadRowError("not exactly one image token", f"{IMAGE_TOKEN} in the caption {caption[:60]!r}")
    number = identity_of([image_name, caption])[0] % len(CAPTION_INSTRUCTIONS)
    return [
        {"from": "human", "value": f"{IMAGE_TOKEN}\n{CAPTION_INSTRUCTIONS[number]}"},
        {"from": "gpt", "value": caption},
    ]


def conversations_about(captions: Sequence[str], image_name: str) -> tuple[Conversation, ...]:
    """Return a conversation for each of at least one caption, equal ones left out."""
    return tuple(conversation_about(caption, image_name) for caption in dict.fromkeys(captions))


def checked_captions(captions: Iterable[Any]) -> list[str]:
    """Return the captions without surrounding space, or raise `BadRowError`: they are texts, one at least not empty."""
    checked = []
    for caption in captions:
        if not isinstance(caption, str):
            raise BadRowError("caption is not a text", f"{str(caption)[:60]!r}")
        check_unicode(caption)
        checked.append(caption.strip())
    if not any(checked):
        raise BadRowError("no caption", f"{len(checked)} captions, none with text")
    return [caption for caption in checked if caption]


def image_name_of(row: Any) -> str | None:
    """Return the row's image path, None where there is none or it is no text."""
    name = row.get("image") if isinstance(row, dict) else None
    return name if isinstance(name, str) else None


def caption_of(row: Mapping[str, Any]) -> str | None:
    """Return the row's caption under this project's or HACL's key, or raise `BadRowError`."""
    caption = row.get("caption", row.get(_HACL_CAPTION))
    if caption is not None and not isinstance(caption, str):
        raise BadRowError("caption is not a text", f"{str(caption)[:60]!r}")
    return caption


def hallucinated_captions_of(row: Mapping[str, Any]) -> tuple[HallucinatedCaption, ...]:
    """Return the row's lies under this project's or HACL's key, or raise `BadRowError`."""
    found = row.get("hallucinated_captions")
    if found is None:
        single = row.get(_HACL_HALLUCINATION)
        found = [] if single is None else [{"type": "unspecified", "text": single}]
    if not isinstance(found, list):
        raise BadRowError("hallucinated captions are not [{type, text}]", f"{str(found)[:60]!r}")
    for item in found:
        known = isinstance(item, dict) and item.get("type") in (*HALLUCINATION_TYPES, "unspecified")
        spans = known and all(isinstance(item.get(name, ""), str) for name in ("original", "replacement"))
        if not spans or not isinstance(item.get("text"), str):
            raise BadRowError("hallucinated captions are not [{type, text}]", f"{str(item)[:60]!r}")
    return tuple(
        HallucinatedCaption(item["type"], item["text"], item.get("original", ""), item.get("replacement", ""))
        for item in found
    )
