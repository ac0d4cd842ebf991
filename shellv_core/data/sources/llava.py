"""LLaVA's format: rows of id, image and conversations; with captions also HACL's and this project's."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from shellv_core.data.samples import Sample
from shellv_core.data.sources.base import BadRowError
from shellv_core.data.sources.checks import checked_object, id_of, image_name_of, row_identity, sample_of
from shellv_core.data.sources.config import LlavaSource
from shellv_core.data.sources.images import open_images
from shellv_core.data.sources.json_source import JsonSource


class LlavaRows(JsonSource):
    """Rows of LLaVA's format; those without an image are text."""

    def __init__(self, config: LlavaSource) -> None:
        super().__init__(config.annotations, config.prefix, open_images(config.images))
        self._answers_are_captions = config.answers_are_captions

    def identity(self, row: Any) -> bytes:
        """Return a hash of the keys that make the sample."""
        return row_identity(row)

    def row_id(self, row: Any) -> str | None:
        """Return ``id``."""
        return id_of(row)

    def image_name(self, row: Any) -> str | None:
        """Return ``image``."""
        return image_name_of(row)

    def sample(self, row: Any, number: int) -> Sample:
        """Return `row` as a sample; see `Source`."""
        row, name = checked_object(row), image_name_of(row)
        if name is None and row.get("image") is not None:
            raise BadRowError("image is not one path", f"{str(row['image'])[:60]!r}; one image a row is supported")
        sample = sample_of(
            row,
            key=self.key(number),
            default_id=str(number),
            source=self.name,
            image_name=name,
            read=self.images.read,
        )
        if self._answers_are_captions and sample.caption is None and sample.image and len(sample.conversations) == 2:
            return replace(sample, caption=sample.conversations[1]["value"].strip())
        return sample
