"""Reading an option's letter from the answer to a multiple-choice question."""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGHIJ"

_LEADING = re.compile(r"\(([A-J])\)|([A-J])(?:[.:,)]|\s*$|\s*\n)")
_STATED = re.compile(r"\b(?i:answer|option|choice)(?i:\s+is)?\s*:?\s*\(?([A-J])\b\)?(?!\s+[a-z])")


def parse_choice(text: str, choices: Sequence[str]) -> int | None:
    """Index of the choice that an answer names, None where it names none or several.

    The answer is a letter alone or first ("B", "(B)", "B. cat"), or says "the answer is B", or is one choice's text.
    A letter beyond the choices is no answer, and nothing is ever guessed.
    """
    text = text.strip()
    match = _LEADING.match(text)
    letters = {match.group(1) or match.group(2)} if match else set(_STATED.findall(text))
    if not letters:
        plain = text.rstrip(".").lower()
        letters = {
            LETTERS[index] for index, choice in enumerate(choices) if choice.strip().rstrip(".").lower() == plain
        }
    if len(letters) != 1:
        return None
    index = LETTERS.index(letters.pop())
    return index if index < len(choices) else None
