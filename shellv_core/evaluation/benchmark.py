"""What every benchmark is: questions in, answers out, scores with counts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from shellv_core.evaluation.rows import read_answers

Scores = dict[str, Any]
"""Metric name -> number, interval ``[low, high]`` or a nested `Scores`."""

Outcomes = Mapping[str, tuple[int, int]]
"""Question or image -> (events, trials): (1, 1) for a right answer, (2, 5) for a caption with two hallucinated mentions
among five. The metric is the sum of events over the sum of trials."""


@dataclass(frozen=True)
class Question:
    """One prompt; `question_id` is unique within its benchmark, `image` is empty where there is none to show."""

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

    def expected(self, question_id: str) -> str:
        """What is right, for people to read; empty where nobody knows."""
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


@runtime_checkable
class JudgedBenchmark(Benchmark, Protocol):
    """A benchmark whose answers a judge reads: `score` and `outcomes` take the judge's words instead of the model's."""

    def judge_questions(self, answers: Mapping[str, str], judgments: Mapping[str, str]) -> Sequence[Question]:
        """What the judge is to be asked about `answers` (question id -> text), given what it has said already.

        The ids are those of `score`; `image` is set where the judge has to see it.
        """
        ...


Judge = Callable[[Sequence[Question]], Mapping[str, str]]
"""Questions for a judge -> its words by question id; what it could not judge is left out."""


def judge_answers(benchmark: JudgedBenchmark, answers: Mapping[str, str], judge: Judge) -> dict[str, str]:
    """Ask the judge all that the benchmark wants to know, each question once; returns its words by question id."""
    judgments: dict[str, str] = {}
    asked: set[str] = set()
    while questions := [
        question for question in benchmark.judge_questions(answers, judgments) if question.question_id not in asked
    ]:
        asked.update(question.question_id for question in questions)
        judgments.update(judge(questions))
    return judgments


@dataclass(frozen=True)
class Option:
    """One more file or setting of a benchmark.

    Attributes:
        name: keyword of `Entry.open`; on the command line ``--`` and the name with dashes.
        help: what it is.
        choices: what is allowed where it is no file; the first is the default.
    """

    name: str
    help: str
    choices: tuple[str, ...] = ()
    required: bool = False


@dataclass(frozen=True)
class Entry:
    """A benchmark's place in the registry: its name, its files and how they are read.

    Attributes:
        name: what ``shellv score`` calls it.
        summary: one line.
        questions: the question file that it takes.
        answers: the answer files that it takes, in two lines, the second an example.
        published: where its authors publish the questions.
        metrics: what is scored.
        rules: how the authors' rule and the strict one differ.
        open: makes the benchmark of the question file's path (None if it was not given) and the options by name.
        read: question id -> text of an answer file.
        upload: content of the file that the benchmark's test server takes.
    """

    name: str
    summary: str
    questions: str
    answers: str
    published: str
    metrics: str
    rules: str
    open: Callable[..., Benchmark]
    read: Callable[[Any, Path], dict[str, str]] = lambda _, path: read_answers(path)
    options: tuple[Option, ...] = ()
    questions_required: bool = True
    upload: Callable[[Any, Mapping[str, str]], bytes] | None = None
