"""Settings of the data sources."""

from __future__ import annotations

from pydantic import Field, model_validator

from shellv_core.config import Config
from shellv_core.data.scenes.config import ScenesConfig, Share


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


class LlavaSource(Config):
    """Any LLaVA-format JSON list with its image folder. Addresses are local paths, ``s3://`` or ``file://`` URIs."""

    annotations: str
    image_folder: str
    validation_fraction: Share = 0.0  # rows that go to the validation split, chosen by a hash of the image's name
    max_rejected_fraction: Share = 0.01  # more bad rows than this fail the stage
    content_stamp: str = ""  # filled in by the stage: identifies the rows and images that it found
