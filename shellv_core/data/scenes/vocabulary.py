"""The words of the scenes: categories, themes, colors, places and events."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Category:
    """A COCO category as the scenes use it."""

    name: str
    plural: str
    tintable: bool = False  # looks natural in any color
    directed: bool = True  # one sees whether it stands upright
    countable: bool = True


_IRREGULAR = {
    "person": "people", "bus": "buses", "sheep": "sheep", "couch": "couches", "sandwich": "sandwiches",
    "knife": "knives", "wine glass": "wine glasses", "mouse": "mice", "skis": "skis", "scissors": "scissors",
    "toothbrush": "toothbrushes", "broccoli": "broccoli",
}  # fmt: skip
_TINTABLE = {
    "bicycle", "car", "motorcycle", "airplane", "bus", "train", "truck", "boat", "backpack", "umbrella", "handbag",
    "suitcase", "frisbee", "tennis racket", "bottle", "cup", "bowl", "chair", "couch", "bed", "book", "clock", "vase",
    "teddy bear", "toothbrush",
}  # fmt: skip
_UNDIRECTED = {
    "airplane", "stop sign", "traffic light", "frisbee", "sports ball", "kite", "skateboard", "tennis racket",
    "knife", "spoon", "banana", "apple", "orange", "carrot", "hot dog", "pizza", "donut", "sandwich", "mouse",
    "keyboard", "cell phone", "scissors", "toothbrush", "book", "bottle", "skis",
}  # fmt: skip
_UNCOUNTABLE = {"skis", "scissors", "broccoli"}

# How often a category is drawn within a theme; a theme's places are where its scenes mostly are.
THEMES: dict[str, dict[str, int]] = {
    "street": {"person": 5, "car": 7, "bus": 3, "truck": 3, "bicycle": 3, "motorcycle": 3, "traffic light": 4,
               "stop sign": 2},
    "travel": {"person": 4, "suitcase": 4, "backpack": 3, "handbag": 3, "train": 3, "airplane": 3, "boat": 3,
               "umbrella": 3, "tie": 2},
    "farm": {"dog": 5, "cow": 4, "horse": 4, "sheep": 4, "bird": 4, "cat": 2, "person": 2},
    "safari": {"elephant": 4, "zebra": 4, "giraffe": 4, "bear": 3, "bird": 2},
    "sports": {"person": 5, "sports ball": 4, "tennis racket": 3, "frisbee": 3, "kite": 3, "skateboard": 3, "skis": 2},
    "table": {"cup": 5, "bottle": 4, "wine glass": 3, "bowl": 4, "knife": 3, "spoon": 3, "cake": 2, "pizza": 2},
    "food": {"apple": 3, "banana": 3, "orange": 3, "carrot": 3, "broccoli": 3, "sandwich": 3, "hot dog": 3, "pizza": 3,
             "donut": 3, "cake": 2},
    "living room": {"couch": 4, "chair": 6, "tv": 4, "potted plant": 3, "vase": 3, "clock": 3, "cat": 3, "book": 3},
    "office": {"laptop": 4, "keyboard": 3, "mouse": 3, "cell phone": 4, "book": 3, "chair": 3, "cup": 3, "scissors": 2},
    "bedroom": {"bed": 4, "teddy bear": 4, "toothbrush": 3, "toilet": 3, "clock": 2, "book": 2},
}  # fmt: skip

COMPANIONS: dict[str, str] = {
    "car": "traffic light", "traffic light": "car", "bus": "stop sign", "motorcycle": "bicycle",
    "suitcase": "backpack", "backpack": "suitcase", "tie": "handbag", "boat": "umbrella", "train": "suitcase",
    "cow": "horse", "horse": "cow", "sheep": "dog", "dog": "bird", "zebra": "giraffe", "giraffe": "zebra",
    "elephant": "bear", "tennis racket": "sports ball", "sports ball": "tennis racket", "frisbee": "dog",
    "skateboard": "person", "kite": "person", "knife": "spoon", "spoon": "knife", "bottle": "wine glass",
    "wine glass": "bottle", "bowl": "spoon", "apple": "banana", "banana": "apple", "broccoli": "carrot",
    "carrot": "broccoli", "hot dog": "sandwich", "donut": "cup", "couch": "tv", "tv": "couch", "cat": "couch",
    "vase": "potted plant", "potted plant": "vase", "laptop": "mouse", "mouse": "keyboard", "keyboard": "laptop",
    "bed": "teddy bear", "teddy bear": "bed", "toilet": "toothbrush", "toothbrush": "toilet", "cup": "book",
}  # fmt: skip

PLACES: dict[str, str] = {
    "grass": "on the grass",
    "beach": "on the beach",
    "road": "on a road",
    "snow": "in the snow",
    "floor": "on a wooden floor",
    "carpet": "on a carpet",
}
THEME_PLACES: dict[str, tuple[str, ...]] = {
    "street": ("road",), "travel": ("beach", "road"), "farm": ("grass",), "safari": ("grass", "beach"),
    "sports": ("grass", "snow"), "table": ("floor", "carpet"), "food": ("floor", "carpet"),
    "living room": ("carpet", "floor"), "office": ("floor",), "bedroom": ("carpet",),
}  # fmt: skip

COLORS: dict[str, tuple[int, int, int]] = {
    "red": (214, 38, 38),
    "green": (46, 160, 60),
    "blue": (44, 96, 222),
    "yellow": (240, 204, 40),
    "purple": (146, 56, 190),
}

# Pose of an object -> how a sentence says it.
EVENTS: dict[str, str] = {
    "upright": "standing upright",
    "upside_down": "upside down",
    "sideways": "lying sideways",
    "floating": "floating high",
}

NUMBERS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight")


def _categories() -> dict[str, Category]:
    names = sorted({name for members in THEMES.values() for name in members})
    return {
        name: Category(
            name=name,
            plural=_IRREGULAR.get(name, name + "s"),
            tintable=name in _TINTABLE,
            directed=name not in _UNDIRECTED,
            countable=name not in _UNCOUNTABLE,
        )
        for name in names
    }


CATEGORIES: dict[str, Category] = _categories()


def article(phrase: str) -> str:
    """Return "a" or "an" by the first letter of `phrase`, as POPE does."""
    return "an" if phrase[0] in "aeiou" else "a"
