"""How often categories occur and occur together in the training scenes."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from shellv_core.data.scenes.config import ScenesConfig
from shellv_core.data.scenes.scene import sample_scene
from shellv_core.data.scenes.vocabulary import CATEGORIES

_MAX_SCENES = 5000  # enough for stable shares; more only costs time


@dataclass(frozen=True)
class Company:
    """Shares over training scenes.

    Attributes:
        frequency: Category -> share of the scenes that contain it.
        together: Category -> other category -> share of the scenes with the first that also contain the second.
    """

    frequency: Mapping[str, float]
    together: Mapping[str, Mapping[str, float]]


@functools.lru_cache(maxsize=4)
def training_company(config: ScenesConfig, seed: int, num_train: int) -> Company:
    """Count the first `num_train` training scenes (at most 5,000 of them), without rendering."""
    single: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    number = max(1, min(num_train, _MAX_SCENES))
    for index in range(number):
        present = sample_scene(config, seed, "train", index).categories
        single.update(present)
        pairs.update((a, b) for a in present for b in present if a != b)
    return Company(
        frequency={name: single[name] / number for name in CATEGORIES},
        together={
            name: {other: pairs[name, other] / single[name] for other in CATEGORIES if pairs[name, other]}
            for name in CATEGORIES
        },
    )
