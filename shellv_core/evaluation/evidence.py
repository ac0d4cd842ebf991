"""What a model was asked, said and got right: all that comparing two models takes, from a run or from its output."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Benchmark, Outcomes, Question, name_of
from shellv_core.evaluation.naming import CANDIDATE, family_of, owner_of
from shellv_core.evaluation.rows import read_rows
from shellv_core.evaluation.statistics import bootstrap_interval, compare_paired
from shellv_core.evaluation.yes_no import parse_strict
from shellv_core.tracking.gate import gain_of, holm, lower_is_better

if TYPE_CHECKING:
    from shellv_core.storage import InputDirectory

OUTCOMES_NAME = "outcomes.json"
QUESTIONS_NAME = "questions/{benchmark}.jsonl"
ANSWERS_NAME = "answers/{row}-{benchmark}.jsonl"
ALPHA = 0.05
YES, NO, NEITHER = "yes", "no", "neither"

Answers = dict[str, dict[str, str]]
"""Benchmark name -> question id -> text."""


@dataclass(frozen=True)
class Asked:
    """A question, and what is right, for people to read."""

    question: Question
    expected: str = ""


@dataclass(frozen=True)
class Evidence:
    """One run of a model.

    Attributes:
        questions: benchmark name -> question id -> question.
        answers: benchmark name -> question id -> what the model said.
        outcomes: flat metric -> outcomes.
    """

    questions: Mapping[str, Mapping[str, Asked]]
    answers: Mapping[str, Mapping[str, str]]
    outcomes: Mapping[str, Outcomes]

    def clusters(self, metric: str) -> dict[str, str]:
        """Question -> image of a metric's benchmark."""
        asked = self.questions.get(self.benchmark(metric), {})
        return {key: each.question.image for key, each in asked.items() if each.question.image}

    def benchmark(self, metric: str) -> str:
        """Name of the benchmark that a metric belongs to; "" for none."""
        return owner_of(metric, self.questions) or ""


def questions_of(benchmarks: Sequence[Benchmark]) -> dict[str, dict[str, Asked]]:
    """All questions by benchmark name and id."""
    return {
        name_of(benchmark): {
            question.question_id: Asked(question, benchmark.expected(question.question_id))
            for question in benchmark.questions
        }
        for benchmark in benchmarks
    }


def question_rows(asked: Mapping[str, Asked]) -> list[dict[str, str]]:
    """Rows of a question file as `read_evaluation` reads them."""
    return [{**asdict(each.question), "expected": each.expected} for each in asked.values()]


def read_evaluation(folder: InputDirectory, row: str = CANDIDATE) -> Evidence:
    """What an evaluate stage's output tells of one of its rows.

    Raises:
        EvaluationError: if it is no such output.
    """
    names = {entry.name for entry in folder.files()}
    if OUTCOMES_NAME not in names:
        raise EvaluationError(f"{folder.uri} is no output of evaluate: it has no {OUTCOMES_NAME}.")
    outcomes: dict[str, dict[str, Outcomes]] = json.loads(folder.fetch(OUTCOMES_NAME).read_bytes())
    start, end = QUESTIONS_NAME.split("{benchmark}")
    questions: dict[str, dict[str, Asked]] = {}
    answers: Answers = {}
    for name in sorted(names):
        if not (name.startswith(start) and name.endswith(end)):
            continue
        benchmark = name.removeprefix(start).removesuffix(end)
        questions[benchmark] = {
            each["question_id"]: Asked(Question(each["question_id"], each["image"], each["prompt"]), each["expected"])
            for each in read_rows(folder.fetch(name))
        }
        said = folder.fetch(ANSWERS_NAME.format(row=row, benchmark=benchmark))
        answers[benchmark] = {str(each["question_id"]): str(each["text"]) for each in read_rows(said)}
    return Evidence(questions, answers, outcomes[row])


def same_questions(first: InputDirectory, second: InputDirectory) -> bool:
    """Whether two evaluations are of the same data and benchmarks."""
    contents = [
        {
            name: directory.manifest.inputs[name].content_sha256
            for name in ("data", "benchmarks")
            if name in directory.manifest.inputs
        }
        for directory in (first, second)
    ]
    return bool(contents[0]) and contents[0] == contents[1]


def figures(evidence: Evidence, seed: int = 0) -> dict[str, dict[str, float]]:
    """Each metric's value with its 95 % interval, images resampled."""
    result = {}
    for metric, outcomes in evidence.outcomes.items():
        low, high = bootstrap_interval(outcomes, evidence.clusters(metric), seed=seed)
        events, trials = (sum(each[place] for each in outcomes.values()) for place in (0, 1))
        result[metric] = {"value": events / trials if trials else 0.0, "low": low, "high": high}
    return result


def compare(first: Evidence, second: Evidence, seed: int = 0) -> dict[str, dict[str, Any]]:
    """Paired comparison of every metric that both have, on the questions that both have.

    Returns:
        metric -> the fields of `PairedComparison`, `p_holm` (adjusted over all metrics here) and `verdict`: ``better``
        or ``worse`` of the first where `p_holm` is at most 0.05, else ``even``.

    Raises:
        EvaluationError: if they share no question of a metric.
    """
    compared = {
        metric: compare_paired(outcomes, second.outcomes[metric], first.clusters(metric), seed=seed)
        for metric, outcomes in first.outcomes.items()
        if metric in second.outcomes and outcomes and second.outcomes[metric]
    }
    adjusted = holm({metric: each.p_value for metric, each in compared.items()})
    result = {}
    for metric, each in compared.items():
        gain = gain_of(metric, each)
        verdict = "even" if adjusted[metric] > ALPHA or not gain else "better" if gain > 0 else "worse"
        result[metric] = {**asdict(each), "p_holm": adjusted[metric], "verdict": verdict}
    return result


def confusion(evidence: Evidence) -> dict[str, dict[str, dict[str, int]]]:
    """Of each benchmark of yes/no questions, how often what is right was answered how.

    Returns:
        benchmark -> right answer -> ``yes``, ``no`` or ``neither`` (missing answers too) -> questions.
    """
    result: dict[str, dict[str, dict[str, int]]] = {}
    for name, asked in evidence.questions.items():
        if any(each.expected not in (YES, NO) for each in asked.values()):
            continue
        counts = result.setdefault(family_of(name), {right: {YES: 0, NO: 0, NEITHER: 0} for right in (YES, NO)})
        for key, each in asked.items():
            label = parse_strict(evidence.answers[name].get(key, ""))
            counts[each.expected][NEITHER if label is None else YES if label else NO] += 1
    return result


def rightness(evidence: Evidence, benchmark: str) -> dict[str, float]:
    """Question id -> how right its answer is, from 0 to 1: the mean over the benchmark's metrics that count it."""
    shares: dict[str, list[float]] = {}
    for metric, outcomes in evidence.outcomes.items():
        if evidence.benchmark(metric) != benchmark:
            continue
        for key, (events, trials) in outcomes.items():
            if trials:
                share = min(1.0, events / trials)
                shares.setdefault(key, []).append(1 - share if lower_is_better(metric) else share)
    result = {}
    for key in evidence.questions[benchmark]:
        # A metric may count several questions as one, whose ids begin with its key.
        found = shares.get(key) or shares.get(key.rpartition("/")[0])
        if found:
            result[key] = sum(found) / len(found)
    return result
