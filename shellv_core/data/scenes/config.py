"""Settings of the synthetic scenes."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from shellv_core.config import Config

Share = Annotated[float, Field(ge=0.0, le=1.0)]


class ScenesConfig(Config):
    """How scenes look, how biased their company of objects is, and what is asked about them."""

    image_size: int = Field(default=160, ge=64, le=1024)  # pixels, square
    jpeg_quality: int = Field(default=90, ge=30, le=100)
    max_instances: int = Field(default=5, ge=2, le=8)  # pictures of objects in one scene
    theme_share: Share = 0.75  # training scenes: objects drawn from the scene's theme
    validation_theme_share: Share = 0.5  # the same for validation scenes
    pair_share: Share = 0.5  # a drawn object brings its usual companion
    tint_share: Share = 0.6  # a category that can be recolored is recolored
    existence_conversations: int = Field(default=1, ge=1, le=8)  # of questions like "Is there a dog in the image?"
    named_conversations: int = Field(default=1, ge=0, le=8)  # of the same with "Name it first.": "dog yes"
    checklists: int = Field(default=2, ge=0, le=8)  # "Check the image for: dog, cat." -> "dog yes, cat no."
    existence_turns: int = Field(default=12, ge=1, le=24)  # objects asked about in one of these, at most
    hard_negative_share: Share = 0.5  # absent objects asked about that usually accompany those present
    attribute_questions: int = Field(default=3, ge=0, le=16)  # color, count, relation and event
    match_questions: int = Field(default=1, ge=0, le=5)  # Hal-Eval's question about a caption
