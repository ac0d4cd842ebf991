"""Plurals of the words of a vocabulary."""

from __future__ import annotations

_IRREGULAR = {
    "person": "persons",
    "child": "children",
    "foot": "feet",
    "tooth": "teeth",
    "goose": "geese",
    "mouse": "mice",
    "sheep": "sheep",
    "fish": "fish",
    "deer": "deer",
    "ox": "oxen",
    "people": "people",
}


def plurals(word: str) -> tuple[str, ...]:
    """Plurals of a noun in lower case, several where it is not plain which one is written."""
    if word in _IRREGULAR:
        return (_IRREGULAR[word],)
    if word.endswith("man") and word != "human":
        return (word.removesuffix("man") + "men",)
    if word.endswith(("fe", "lf", "af")):
        return word.removesuffix("e")[:-1] + "ves", word + "s"
    if word.endswith(("s", "x", "z", "ch", "sh")):
        return (word + "es",)
    if word.endswith("y") and word[-2:-1] not in tuple("aeiou"):
        return (word[:-1] + "ies",)
    return (word + "s", word + "es") if word.endswith("o") else (word + "s",)
