"""What every benchmark is: questions in, answers out, scores with counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Scores = dict[str, Any]
"""Metric name -> number, interval ``[low, high]`` or a nested `Scores`."""

Outcomes = Mapping[str, tuple[int, int]]
"""Question or image -> (events, trials): (1, 1) for a right answer, (2, 5) for a caption with two hallucinated mentions
among five. The metric is the sum of events over the sum of trials."""


@dataclass(frozen=True)
class Question:
    """One prompt about one image; `question_id` is unique within its benchmark."""

    question_id: str
    image: str
    prompt: str


class Benchmark(Protocol):
    """A set of questions and the rule that scores their answers.

    Attributes:
        key: place of its scores in the results, for example ``("pope", "random")``; joined by ``_`` it names files.
        max_new_tokens: enough for an answer of the expected kind.
    """

    key: tuple[str, ...]
    max_new_tokens: int

    @property
    def questions(self) -> Sequence[Question]:
        """All questions, in file order."""
        ...

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Scores of `answers` (question id -> text); what is missing counts as wrong and is counted."""
        ...

    def outcomes(self, answers: Mapping[str, str]) -> dict[str, Outcomes]:
        """Headline metric (by its flat name) -> its parts, which pair two models' answers to the same questions."""
        ...


def name_of(benchmark: Benchmark) -> str:
    """The benchmark's name in files and flat metrics, for example ``pope_random``."""
    return "_".join(benchmark.key)
