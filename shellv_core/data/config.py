"""Settings of the data: sources, shards, limits."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import Field, model_validator

from shellv_core.config import Config, nearest
from shellv_core.data.hallucination.config import HallucinationConfig
from shellv_core.data.scenes.config import ScenesConfig, Share
from shellv_core.data.sources.base import REASONS
from shellv_core.data.sources.config import (
    CocoSource,
    FolderSource,
    HalEvalSource,
    LlavaSource,
    ParquetSource,
    SourceConfig,
    TsvSource,
    WebDatasetSource,
)
from shellv_core.templates import DEFAULT_TEMPLATE, TEMPLATES

ROW_SOURCES = ("llava", "hal_eval", "coco", "tsv", "folder", "parquet", "webdataset")


class ScenesSource(Config):
    """Synthetic scenes with their benchmarks."""

    num_train: int = Field(default=5000, ge=1)
    num_validation: int = Field(default=500, ge=1)
    benchmark_images: int = Field(default=200, ge=1)  # validation images that each benchmark asks about
    pope_questions: int = Field(default=6, ge=2, le=8, multiple_of=2)  # a POPE split's questions about one image
    scenes: ScenesConfig = ScenesConfig()

    @model_validator(mode="after")
    def _enough_images(self) -> ScenesSource:
        if self.benchmark_images > self.num_validation:
            raise ValueError(
                f"benchmark_images={self.benchmark_images} must not exceed num_validation={self.num_validation}"
            )
        return self


class TokensConfig(Config):
    """Whose tokens the index counts, so that packing can plan without a pass over the data."""

    tokenizer: str  # directory or hub id
    template: str = DEFAULT_TEMPLATE  # conversation template, see shellv_core.templates

    @model_validator(mode="after")
    def _known(self) -> TokensConfig:
        if self.template not in TEMPLATES:
            raise ValueError(f"unknown conversation template {self.template!r}; {nearest(self.template, TEMPLATES)}")
        return self


class DataConfig(Config):
    """What goes into a data set; with several sources it is their union."""

    scenes: ScenesSource | None = None
    llava: LlavaSource | None = None
    hal_eval: HalEvalSource | None = None
    coco: CocoSource | None = None
    tsv: TsvSource | None = None
    folder: FolderSource | None = None
    parquet: ParquetSource | None = None
    webdataset: WebDatasetSource | None = None
    samples_per_shard: int = Field(default=512, ge=1)  # rows of a source to a shard, bad ones included
    validation_fraction: Share = 0.0  # of the row sources: samples for validation, chosen by a hash of their image
    max_rejected_fraction: Share = 0.01  # more bad rows than this fail the stage
    max_rejected: dict[str, Share] = {}  # the same for single reasons: {image file missing: 0.001}
    #: What makes a row a duplicate, to be left out: the same text about an image of the same name (rows), about an
    #: image of the same bytes (content, which reads every image once more), or nothing (off).
    deduplicate: Literal["rows", "content", "off"] = "rows"
    tokens: TokensConfig | None = None  # null counts words only
    #: Make hallucinated captions for samples of the row sources that have a caption and none.
    hallucination: HallucinationConfig | None = None
    #: Shrink images whose longer side has more pixels than this, and store them as JPEG; null keeps every byte.
    resize_longest: int | None = Field(default=None, ge=32)

    @model_validator(mode="after")
    def _known_reasons(self) -> DataConfig:
        for reason in self.max_rejected:
            if reason not in REASONS:
                raise ValueError(f"{reason!r} is no reason; {nearest(reason, REASONS)}")
        return self

    @model_validator(mode="after")
    def _some_source(self) -> DataConfig:
        if self.scenes is None and not any(True for _ in self.row_sources()):
            raise ValueError(
                "no data source is given; set scenes.num_train=N for synthetic scenes, llava.annotations=FILE.json and"
                f" llava.images=FOLDER, or another of {', '.join(ROW_SOURCES[1:])}"
            )
        return self

    def row_sources(self) -> Iterator[tuple[str, SourceConfig]]:
        """The sources of rows that are given, by their names here."""
        for name in ROW_SOURCES:
            source = getattr(self, name)
            if source is not None:
                yield name, source
