"""Photographs for tests: the real ones where they are at hand, else pictures of the same kind."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image

SHARED_IMAGES = Path(__file__).resolve().parents[3] / "shared" / "images"


def photo_like_jpeg(seed: int, size: tuple[int, int] = (320, 240)) -> bytes:
    """A JPEG of smooth colors and fine grain."""
    generator = np.random.default_rng(seed)
    coarse = Image.fromarray(generator.integers(0, 256, (6, 8, 3), dtype=np.uint8)).resize(
        size, Image.Resampling.BICUBIC
    )
    noisy = np.asarray(coarse, np.int16) + generator.normal(0, 8, (size[1], size[0], 3)).astype(np.int16)
    buffer = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def three_photos() -> dict[str, bytes]:
    """Name -> bytes of three JPEGs."""
    found = sorted(SHARED_IMAGES.glob("*.jpg"))[:3] if SHARED_IMAGES.is_dir() else []
    if len(found) == 3:
        return {path.name: path.read_bytes() for path in found}
    return {f"photo-{seed}.jpg": photo_like_jpeg(seed) for seed in range(3)}
