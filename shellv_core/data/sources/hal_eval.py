"""Hal-Eval's format (WisdomShell/hal-eval, evaluation_dataset): a caption and a lie of each of four types."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Any

from shellv_core.data.samples import HallucinationType, Sample
from shellv_core.data.sources.base import BadRowError
from shellv_core.data.sources.checks import checked_captions, checked_object, id_of, identity_of, sample_of
from shellv_core.data.sources.config import HalEvalSource
from shellv_core.data.sources.images import open_images
from shellv_core.data.sources.json_source import JsonSource

TYPES: Mapping[str, HallucinationType] = {
    "Objective Hallucination": "object",
    "Attributive Hallucination": "attribute",
    "Spatial Relationship Hallucination": "relation",
    "Event Hallucination": "event",
}


class HalEvalRows(JsonSource):
    """Rows of Hal-Eval.

    A lie that is empty or equals the caption is no lie and is left out (2 of the 40,000 published); its row stays.
    """

    def __init__(self, config: HalEvalSource) -> None:
        super().__init__(config.annotations, config.prefix, open_images(config.images))

    def identity(self, row: Any) -> bytes:
        """Return a hash of the image's name, the caption and the lies."""
        if isinstance(row, dict):
            row = [self.image_name(row), row.get("caption"), row.get("hal_caption")]
        return identity_of(row)

    def row_id(self, row: Any) -> str | None:
        """Return ``key``, which the out-of-domain list has."""
        return id_of(row, "key")

    def image_name(self, row: Any) -> str | None:
        """Return ``image``, or the file name of ``image_path``."""
        if not isinstance(row, dict):
            return None
        name, path = row.get("image"), row.get("image_path")
        if name is None and isinstance(path, str):
            return PurePosixPath(path).name
        return name if isinstance(name, str) else None

    def sample(self, row: Any, number: int) -> Sample:
        """Return `row` as a sample with its lies; see `Source`."""
        row, name = checked_object(row), self.image_name(row)
        if name is None:
            raise BadRowError("no image", "neither image nor image_path is a path")
        (caption,) = checked_captions([row.get("caption")])
        lies = [lie for lie in _lies(row.get("hal_caption")) if lie["text"] and lie["text"] != caption]
        return sample_of(
            {"caption": caption, "hallucinated_captions": lies},
            key=self.key(number),
            default_id=self.row_id(row) or str(number),
            source=self.name,
            image_name=name,
            read=self.images.read,
        )


def _lies(found: Any) -> list[dict[str, str]]:
    if not isinstance(found, list):
        raise BadRowError("hallucinated captions are not [{type, text}]", f"hal_caption is {str(found)[:60]!r}")
    for item in found:
        kind = item.get("type") if isinstance(item, dict) else None
        if not isinstance(kind, str) or kind not in TYPES or not isinstance(item.get("caption"), str):
            raise BadRowError(
                "hallucinated captions are not [{type, text}]", f"{str(item)[:80]!r}; types are {', '.join(TYPES)}"
            )
    return [{"type": TYPES[item["type"]], "text": item["caption"].strip()} for item in found]
