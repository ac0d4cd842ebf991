"""What is in a scene: sampled objects, their places and the ground truth. Draws no pixels.

A scene is a pure function of (config, seed, split, index).
"""

from __future__ import annotations

import functools
import itertools
import random
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from shellv_core.data.samples import SampleObject
from shellv_core.data.scenes.artwork import pictures
from shellv_core.data.scenes.config import ScenesConfig
from shellv_core.data.scenes.vocabulary import (
    CATEGORIES,
    COLORS,
    COMPANIONS,
    EVENTS,
    PLACES,
    THEME_PLACES,
    THEMES,
)

Split = Literal["train", "validation"]
RelationName = Literal["left", "right", "above", "below"]

Axis = Literal["horizontal", "vertical"]

AXES: tuple[Axis, ...] = ("horizontal", "vertical")
OPPOSITE: dict[RelationName, RelationName] = {"left": "right", "right": "left", "above": "below", "below": "above"}

_HORIZONTAL_GAP = 0.1  # centers at least this share of the image apart for "to the left of"
_VERTICAL_GAP = 0.22
_SIDE_GAP = 0.12  # distance from the middle for "on the left side"
_MAX_OVERLAP = 0.25
_FLOAT_LIMIT = 0.36  # a floating object ends above this height, all others below it


@dataclass(frozen=True)
class Instance:
    """One picture in the scene. Lengths are shares of the image side; the origin is top left."""

    category: str
    picture: str  # file of the artwork
    center_x: float
    center_y: float
    size: float  # longer side of the picture
    flipped: bool
    tilt: float  # degrees


@dataclass(frozen=True)
class Scene:
    """A scene's ground truth. `objects` are ordered from left to right, with one object per category."""

    key: str
    place: str  # a key of PLACES
    night: bool
    objects: tuple[SampleObject, ...]
    focus: str  # the category that the event is about; there is one of it
    event: str  # a key of EVENTS
    instances: tuple[Instance, ...]
    background_seed: int

    @property
    def categories(self) -> tuple[str, ...]:
        """The categories present, from left to right."""
        return tuple(item.category for item in self.objects)

    def relation(self, first: str, second: str, axis: Axis) -> RelationName | None:
        """Where category `first` is as seen from `second`, or None where it is not clear-cut.

        It is clear-cut when every instance of one lies on the same side of every instance of the other by a margin.
        """
        a = [item for item in self.instances if item.category == first]
        b = [item for item in self.instances if item.category == second]
        if axis == "horizontal":
            if max(i.center_x for i in a) + _HORIZONTAL_GAP <= min(i.center_x for i in b):
                return "left"
            if max(i.center_x for i in b) + _HORIZONTAL_GAP <= min(i.center_x for i in a):
                return "right"
            return None
        if max(i.center_y for i in a) + _VERTICAL_GAP <= min(i.center_y for i in b):
            return "above"
        if max(i.center_y for i in b) + _VERTICAL_GAP <= min(i.center_y for i in a):
            return "below"
        return None

    def side(self, category: str) -> Literal["left", "right"] | None:
        """The side of the image on which every instance of `category` lies, or None."""
        centers = [item.center_x for item in self.instances if item.category == category]
        if max(centers) <= 0.5 - _SIDE_GAP:
            return "left"
        if min(centers) >= 0.5 + _SIDE_GAP:
            return "right"
        return None


def draw(rng: random.Random, weights: Mapping[str, float]) -> str:
    """Draw a key of `weights` with a chance proportional to its value."""
    return rng.choices(list(weights), weights=list(weights.values()))[0]


@functools.cache
def _overall_weights() -> dict[str, float]:
    """How often each category is drawn when no theme applies: flatter than within the themes."""
    return {name: sum(members.get(name, 0) for members in THEMES.values()) ** 0.5 for name in CATEGORIES}


def scene_rng(seed: int, split: Split, index: int, purpose: str) -> random.Random:
    """Return the generator of one scene and purpose; equal arguments give equal draws on every machine."""
    return random.Random(f"{seed}/{split}/{index}/{purpose}")


def sample_scene(config: ScenesConfig, seed: int, split: Split, index: int) -> Scene:
    """Sample scene `index` of a split.

    Every scene has one object of which an event is known, at least one color or repeated object, and one clear
    left/right relation, so that captions with all four kinds of hallucination exist for it.
    """
    rng = scene_rng(seed, split, index, "scene")
    while True:
        scene = _try_scene(config, rng, split, index)
        if scene is not None:
            return scene


def _try_scene(config: ScenesConfig, rng: random.Random, split: Split, index: int) -> Scene | None:
    theme = rng.choice(list(THEMES))
    share = config.theme_share if split == "train" else config.validation_theme_share
    kinds = _sample_categories(rng, THEMES[theme], share, config.pair_share, rng.choices((1, 2, 3, 4), (1, 3, 3, 2))[0])
    kinds = kinds[: config.max_instances]

    candidates = [name for name in kinds if CATEGORIES[name].directed]
    if not candidates:
        return None
    focus = rng.choice(candidates)
    counts = _sample_counts(config, rng, kinds, focus)
    colors = {
        name: rng.choice(list(COLORS))
        for name in kinds
        if CATEGORIES[name].tintable and rng.random() < config.tint_share
    }
    if not colors and max(counts.values()) == 1:
        return None
    event = rng.choice(list(EVENTS))
    instances = _place(rng, kinds, counts, focus, event)
    if _covered(instances):
        return None
    place = rng.choice(THEME_PLACES[theme]) if rng.random() < share else rng.choice(list(PLACES))
    scene = Scene(
        key=f"{split}-{index:07d}",
        place=place,
        night=rng.random() < 0.3,
        objects=tuple(
            SampleObject(name, counts[name], colors.get(name), event if name == focus else None) for name in kinds
        ),
        focus=focus,
        event=event,
        instances=tuple(instances),
        background_seed=rng.getrandbits(32),
    )
    if len(kinds) == 1:
        return scene if scene.side(kinds[0]) else None
    clear = any(scene.relation(a, b, "horizontal") for a, b in itertools.pairwise(kinds))
    return scene if clear else None


def _sample_categories(
    rng: random.Random, members: Mapping[str, int], share: float, pair_share: float, number: int
) -> list[str]:
    chosen = [draw(rng, members)]
    while len(chosen) < number:
        companion = COMPANIONS.get(chosen[-1])
        if companion is not None and companion not in chosen and rng.random() < share * pair_share:
            chosen.append(companion)
            continue
        weights = members if rng.random() < share else _overall_weights()
        name = draw(rng, weights)
        if name not in chosen:
            chosen.append(name)
    rng.shuffle(chosen)
    return chosen


def _sample_counts(config: ScenesConfig, rng: random.Random, kinds: list[str], focus: str) -> dict[str, int]:
    counts = dict.fromkeys(kinds, 1)
    room = config.max_instances - len(kinds)
    for name in kinds:
        # Two and three are equally frequent, so that neither sounds more like a lie.
        if room >= 2 and name != focus and CATEGORIES[name].countable and rng.random() < 0.4:
            extra = rng.choice((1, 2))
            counts[name] += extra
            room -= extra
    return counts


def _covered(instances: list[Instance]) -> bool:
    """Whether two pictures overlap by more than `_MAX_OVERLAP` of the smaller one's square."""
    for number, a in enumerate(instances):
        for b in instances[number + 1 :]:
            reach = (a.size + b.size) / 2
            width = reach - abs(a.center_x - b.center_x)
            height = reach - abs(a.center_y - b.center_y)
            if width > 0 and height > 0 and width * height > _MAX_OVERLAP * min(a.size, b.size) ** 2:
                return True
    return False


def _place(rng: random.Random, kinds: list[str], counts: Mapping[str, int], focus: str, event: str) -> list[Instance]:
    """Give each instance a column of its own, in the order of `kinds`, and a depth: lower in the image is larger."""
    names = [name for name in kinds for _ in range(counts[name])]
    columns = len(names)
    looks = {name: (rng.choice(pictures(name)), rng.random() < 0.5, rng.uniform(0.8, 1.25)) for name in kinds}
    width = 0.94 / max(columns, 2)
    start = 0.03 if columns > 1 else rng.choice((0.03, 0.5))
    placed = []
    for position, name in enumerate(names):
        picture, flipped, scale = looks[name]
        size = min(0.5, max(0.2, scale * min(0.42, width * 1.15) * rng.uniform(0.9, 1.1)))
        size = min(size, _FLOAT_LIMIT - 0.04) if name == focus and event == "floating" else size
        center_x = start + width * (position + 0.5) + rng.uniform(-0.08, 0.08) * width
        center_x = min(max(center_x, size / 2), 1 - size / 2)
        if name == focus and event == "floating":
            center_y = rng.uniform(0.02 + size / 2, _FLOAT_LIMIT - size / 2)
            tilt = rng.uniform(-12, 12)
        else:
            bottom = rng.uniform(max(0.66, _FLOAT_LIMIT + size + 0.04), 0.97)
            center_y = bottom - size / 2
            tilt = rng.uniform(-8, 8)
            if name == focus and event == "upside_down":
                tilt += 180
            elif name == focus and event == "sideways":
                tilt += rng.choice((-90, 90))
        placed.append(
            Instance(name, picture, round(center_x, 4), round(center_y, 4), round(size, 4), flipped, round(tilt, 1))
        )
    return placed
