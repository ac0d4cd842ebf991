"""ScienceQA: multiple-choice questions, some with an image.

Questions are the authors' problems.json, or LLaVA's list of ``{"id", "image"?, "conversations"}`` made of it; subjects,
contexts and grades are known from problems.json alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Entry, Option, Outcomes, Question, Scores
from shellv_core.evaluation.choices import LETTERS, parse_choice
from shellv_core.evaluation.rows import check_overlap, index_answers, read_document, read_rows
from shellv_core.evaluation.yes_no import wilson_interval

SPLITS = ("test", "val", "train")
LETTER_SUFFIX = "\nAnswer with the option's letter from the given choices directly."
SUBJECTS = {"natural science": "NAT", "social science": "SOC", "language science": "LAN"}
_OPTION = re.compile(r"\(([A-E])\)\s*(.*?)\s*(?=\([A-E]\)|$)", re.DOTALL)
_STATED = re.compile("The answer is ([A-Z]).")


@dataclass(frozen=True)
class Problem:
    """One question: its choices, the index of the right one, and the groups that it belongs to (subject, context,
    grade)."""

    image: str
    prompt: str
    choices: tuple[str, ...]
    answer: int
    groups: tuple[str, ...] = ()


class ScienceQa:
    """A set of ScienceQA problems by their ids.

    Raises:
        EvaluationError: if there are none.
    """

    key: tuple[str, ...] = ("scienceqa",)
    max_new_tokens = 16

    def __init__(self, problems: Mapping[str, Problem]) -> None:
        if not problems:
            raise EvaluationError("there are no ScienceQA problems of that split.")
        self.problems = dict(problems)
        self._questions = tuple(Question(key, each.image, each.prompt) for key, each in problems.items())

    @property
    def questions(self) -> Sequence[Question]:
        """All questions, in file order."""
        return self._questions

    def expected(self, question_id: str) -> str:
        """The right choice."""
        problem = self.problems[question_id]
        return f"{LETTERS[problem.answer]}. {problem.choices[problem.answer]}"

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Accuracy over all problems, those with an image, and each group.

        Returns:
            accuracy with its 95 % interval, image_accuracy, by_group where it is known, and counts; a missing or
            unparsed answer is wrong. `author_rule` has accuracy and image_accuracy by LLaVA's rule, whose
            image_accuracy leaves out what was not answered.
        """
        num_unknown = check_overlap(self.problems, answers)
        labels = {key: self._parse(key, answers[key]) for key in self.problems if key in answers}
        author = {key: self._parse_as_llava(key, answers[key]) for key in self.problems if key in answers}
        with_image = [key for key, problem in self.problems.items() if problem.image]
        groups: dict[str, list[str]] = {}
        for key, problem in self.problems.items():
            for group in problem.groups:
                groups.setdefault(group, []).append(key)
        correct = self._count(self.problems, labels)
        return {
            "accuracy": correct / len(self.problems),
            "accuracy_interval": list(wilson_interval(correct, len(self.problems))),
            "image_accuracy": self._share(with_image, labels),
            "by_group": {group: self._share(groups[group], labels) for group in sorted(groups)},
            "num_questions": len(self.problems),
            "num_image_questions": len(with_image),
            "num_correct": correct,
            "num_unparsed": sum(label is None for label in labels.values()),
            "num_missing": len(self.problems) - len(labels),
            "num_unknown": num_unknown,
            "author_rule": {
                "accuracy": self._share(self.problems, author),
                "image_accuracy": self._share([key for key in with_image if key in answers], author),
                "num_unparsed": sum(label is None for label in author.values()),
            },
        }

    def outcomes(self, answers: Mapping[str, str]) -> dict[str, Outcomes]:
        """Accuracy by the strict rule, per question."""
        return {
            "scienceqa_accuracy": {
                key: (int(key in answers and self._parse(key, answers[key]) == problem.answer), 1)
                for key, problem in self.problems.items()
            }
        }

    def _parse(self, key: str, text: str) -> int | None:
        return parse_choice(text, self.problems[key].choices)

    def _parse_as_llava(self, key: str, text: str) -> int | None:
        """The letter alone, or before ". ", or the only one after "The answer is"; A to E that the problem has."""
        letter = text
        if len(text) >= 3 and text[0] in LETTERS[:5] and text[1:3] == ". ":
            letter = text[0]
        elif text not in LETTERS[:5] or not text:
            stated = _STATED.findall(text)
            letter = stated[0] if len(stated) == 1 else ""
        index = LETTERS.find(letter) if len(letter) == 1 else -1
        return index if 0 <= index < min(5, len(self.problems[key].choices)) else None

    def _count(self, keys: Iterable[str], labels: Mapping[str, int | None]) -> int:
        return sum(labels.get(key) == self.problems[key].answer for key in keys)

    def _share(self, keys: Iterable[str], labels: Mapping[str, int | None]) -> float:
        keys = list(keys)
        return self._count(keys, labels) / len(keys) if keys else 0.0


def read_problems(problems: Mapping[str, Any], split: str, source: str) -> dict[str, Problem]:
    """Problems of one split of problems.json."""
    result = {}
    for key, row in problems.items():
        place = f"{source}, problem {key}"
        try:
            if row["split"] != split:
                continue
            choices, answer = tuple(map(str, row["choices"])), int(row["answer"])
            image, hint = row.get("image"), str(row.get("hint") or "").strip()
            question = str(row["question"])
        except (KeyError, TypeError, ValueError) as error:
            raise EvaluationError(
                f"{place}: needs split, question, choices and answer (an index): {error!r}."
            ) from None
        if not 0 <= answer < len(choices):
            raise EvaluationError(f"{place}: answer {answer} is no index of its {len(choices)} choices.")
        options = " ".join(f"({LETTERS[index]}) {choice}" for index, choice in enumerate(choices))
        prompt = f"Question: {question}\nContext: {hint or 'N/A'}\nOptions: {options}{LETTER_SUFFIX}"
        name = f"{split}/{key}/{image}" if image else ""
        result[key] = Problem(name, prompt, choices, answer, _groups(row, bool(hint), bool(image)))
    return result


def read_llava(rows: Iterable[Mapping[str, Any]], problems: Mapping[str, Any], source: str) -> dict[str, Problem]:
    """Problems of LLaVA's converted list; groups are those of `problems`, which may be empty."""
    result: dict[str, Problem] = {}
    for number, row in enumerate(rows, start=1):
        place = f"{source}, row {number}"
        try:
            key = str(row["id"])
            asked, told = (str(turn["value"]) for turn in row["conversations"][:2])
        except (KeyError, TypeError, ValueError):
            raise EvaluationError(f"{place}: needs id and conversations with a question and its answer.") from None
        if key in result:
            raise EvaluationError(f"{place}: id {key!r} comes twice.")
        prompt = asked.replace("<image>", "").strip()
        options = _OPTION.findall(prompt.rpartition("Options:")[2].split("\n")[0])
        choices = tuple(choice for _, choice in options)
        stated = _STATED.findall(told + ".")
        letter = told.strip() if told.strip() in LETTERS[: len(choices)] else stated[-1] if stated else ""
        if not letter or letter not in LETTERS[: len(choices)]:
            raise EvaluationError(
                f"{place}: cannot read the right choice of {told!r} among the {len(choices)} options; it should say"
                ' "The answer is A."'
            )
        image = str(row.get("image") or "")
        problem = problems.get(key)
        groups = (
            _groups(problem, bool(str(problem.get("hint") or "").strip()), bool(problem.get("image")))
            if problem
            else ()
        )
        result[key] = Problem(image, prompt + LETTER_SUFFIX, choices, LETTERS.index(letter), groups)
    return result


def _groups(row: Mapping[str, Any], has_text: bool, has_image: bool) -> tuple[str, ...]:
    """NAT, SOC, LAN; TXT, IMG, NO (neither); G1-6, G7-12."""
    subject = SUBJECTS.get(str(row.get("subject", "")))
    grade = re.search(r"\d+", str(row.get("grade", "")))
    return tuple(
        name
        for name, holds in (
            (subject or "", subject is not None),
            ("TXT", has_text),
            ("IMG", has_image),
            ("NO", not has_text and not has_image),
            ("G1-6", grade is not None and 1 <= int(grade.group()) <= 6),
            ("G7-12", grade is not None and 7 <= int(grade.group()) <= 12),
        )
        if holds
    )


def read_result(path: Path) -> dict[str, str]:
    """Problem id -> text of answer rows, or of the result file that LLaVA's scorer writes (its outputs)."""
    document = read_document(path)
    if isinstance(document, dict) and "outputs" in document:
        outputs = document["outputs"]
        if not isinstance(outputs, dict) or not all(isinstance(text, str) for text in outputs.values()):
            raise EvaluationError(f"{path}: outputs is no object of problem id -> text.")
        return dict(outputs)
    return index_answers(read_rows(path), str(path))


def _open(questions: Path, problems: Path | None = None, split: str = SPLITS[0]) -> ScienceQa:
    read: Callable[[Path], Any] = read_document
    document = read(questions)
    if isinstance(document, dict):
        return ScienceQa(read_problems(document, split, str(questions)))
    return ScienceQa(read_llava(document, {} if problems is None else read(problems), str(questions)))


ENTRIES = (
    Entry(
        name="scienceqa",
        summary="ScienceQA: multiple choice, by subject, context and grade",
        questions="problems.json, or LLaVA's llava_test_CQM-A.json",
        answers="rows with question_id and text, or the result file of LLaVA's scorer, whose outputs are read again\n"
        '{"question_id": "4", "text": "B"} or {"acc": 50.0, "correct": 1, "count": 2, "results": {"4": 1}, "outputs":'
        ' {"4": "B"}}',
        published="https://github.com/lupantech/ScienceQA, data/scienceqa",
        metrics="accuracy, image accuracy, by subject (NAT, SOC, LAN), context (TXT, IMG, NO) and grade (G1-6, G7-12)",
        rules='authors: a letter, "B. ...", or one "The answer is B."; strict: also (B) and a choice\'s text',
        open=_open,
        read=lambda _, path: read_result(path),
        options=(
            Option("problems", "problems.json, for the groups, where the questions are LLaVA's list"),
            Option("split", "split of problems.json", SPLITS),
        ),
    ),
)
