"""The pictures of objects and where to find them."""

from __future__ import annotations

import functools
import json
from pathlib import Path

FOLDER = Path(__file__).parent


@functools.cache
def _index() -> dict[str, tuple[str, ...]]:
    by_category: dict[str, list[str]] = {}
    for row in json.loads((FOLDER / "index.json").read_text("utf-8")):
        by_category.setdefault(row["category"], []).append(row["file"])
    return {category: tuple(sorted(files)) for category, files in by_category.items()}


def pictures(category: str) -> tuple[str, ...]:
    """Return the file names of the pictures of a COCO category, at least one for each category of the vocabulary."""
    return _index()[category]
