"""A sample: an image (or none), conversations about it, its caption and hallucinated captions.

The JSON form is the LLaVA row with more keys, so a shard's JSON member is readable by anyone who reads LLaVA data.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import orjson

from shellv_core.errors import DataError
from shellv_core.templates import IMAGE_TOKEN as IMAGE_TOKEN

Turn = dict[str, str]  # {"from": "human" | "gpt", "value": text}
Conversation = list[Turn]

HallucinationType = Literal["object", "attribute", "relation", "event", "unspecified"]
HALLUCINATION_TYPES: tuple[HallucinationType, ...] = ("object", "attribute", "relation", "event")


@dataclass(frozen=True)
class HallucinatedCaption:
    """A false caption. `original` and `replacement` are the changed words of the true and of the false caption.

    `type` is "unspecified" where the source does not tell it (HACL's format). `truth` is the true sentence that it is
    to be told from, in its style, where that is not the sample's caption.
    """

    type: HallucinationType
    text: str
    original: str = ""
    replacement: str = ""
    truth: str = ""


@dataclass(frozen=True)
class SampleObject:
    """All objects of one category in an image; a color or event of None means that nothing is known of it."""

    category: str
    count: int = 1
    color: str | None = None
    event: str | None = None


@dataclass(frozen=True)
class Sample:
    """One row of training or validation data.

    Attributes:
        key: Name within the data set: letters, digits, ``-`` and ``_`` only.
        id: The row's id in its source.
        image: Encoded bytes as the source has them; None for text.
        image_format: "jpg" or "png".
        conversations: Alternating human and gpt turns; the image token stands in a human turn.
        more_conversations: Further ones about the same image, separate because an answer in one could give away
            another's.
        tasks: What `conversations` and each of `more_conversations` ask for; empty where the source does not tell.
        caption: A true sentence about the image.
        hallucinated_captions: False sentences about it.
        objects: What is in the image, where that is known.
        source: Where the row comes from.
        image_source: What that source calls the image.
        width: Of the image in pixels, 0 for text; so is the height.
    """

    key: str
    id: str
    conversations: Conversation
    source: str
    image: bytes | None = None
    image_format: Literal["jpg", "png"] = "jpg"
    more_conversations: tuple[Conversation, ...] = ()
    tasks: tuple[str, ...] = ()
    caption: str | None = None
    hallucinated_captions: tuple[HallucinatedCaption, ...] = ()
    objects: tuple[SampleObject, ...] = ()
    image_source: str | None = None
    width: int = 0
    height: int = 0

    @property
    def num_words(self) -> int:
        """White-space separated words in all conversations."""
        every = (self.conversations, *self.more_conversations)
        return sum(len(turn["value"].split()) for conversation in every for turn in conversation)

    @property
    def image_name(self) -> str | None:
        """The image's member name in a shard and its name in benchmark files."""
        return None if self.image is None else f"{self.key}.{self.image_format}"

    def to_json(self) -> bytes:
        """Return the record without the image's bytes."""
        record = {
            "id": self.id,
            "image": self.image_name,
            "conversations": self.conversations,
            "more_conversations": self.more_conversations,
            "tasks": self.tasks,
            "caption": self.caption,
            "hallucinated_captions": self.hallucinated_captions,
            "objects": self.objects,
            "source": self.source,
            "image_source": self.image_source,
            "width": self.width,
            "height": self.height,
        }
        return orjson.dumps(record)

    @classmethod
    def from_json(cls, key: str, data: bytes, image: bytes | None = None) -> Sample:
        """Rebuild a sample from `to_json` and the image's bytes.

        Raises:
            DataError: if `data` is no such record, or names an image while `image` is None, or the reverse.
        """
        try:
            return cls.from_record(key, orjson.loads(data), image)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"sample {key!r} does not hold a record of this project ({error!r}).") from None

    @classmethod
    def from_record(cls, key: str, record: Mapping[str, Any], image: bytes | None) -> Sample:
        """Rebuild a sample from the fields that `to_json` writes."""
        name = record["image"]
        if (name is None) != (image is None):
            raise DataError(f"sample {key!r} names the image {name!r} but has {'no' if image is None else 'an'} image.")
        return cls(
            key=key,
            id=record["id"],
            conversations=record["conversations"],
            source=record["source"],
            image=image,
            image_format="png" if name is not None and name.endswith(".png") else "jpg",
            more_conversations=tuple(record.get("more_conversations", ())),
            tasks=tuple(record.get("tasks", ())),
            caption=record["caption"],
            hallucinated_captions=tuple(HallucinatedCaption(**item) for item in record["hallucinated_captions"]),
            objects=tuple(SampleObject(**item) for item in record["objects"]),
            image_source=record.get("image_source"),
            width=record.get("width", 0),
            height=record.get("height", 0),
        )


def sample_conversations(sample: Sample, tasks: Sequence[str] | None = None) -> list[Conversation]:
    """The conversations of a sample; if `tasks` are given and the sample tells its own, only those of these tasks."""
    conversations = [sample.conversations, *sample.more_conversations]
    if tasks is None or not sample.tasks:
        return conversations
    return [each for each, task in zip(conversations, sample.tasks, strict=True) if task in tasks]
