"""Writes the lock file that `components.images` reads."""

from __future__ import annotations

from collections.abc import Mapping

import yaml

from components.images import LOCK_PATH, ImageName, ImagesLock, LockedImage

HEADER = "# Made by `make images`: what was built last.\n"


def write_lock(images: Mapping[ImageName, LockedImage]) -> None:
    """Replace the lock file as a whole."""
    lock = ImagesLock(images=dict(images))
    text = HEADER + yaml.safe_dump(lock.model_dump(mode="json"), sort_keys=True)
    unfinished = LOCK_PATH.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    unfinished.replace(LOCK_PATH)
