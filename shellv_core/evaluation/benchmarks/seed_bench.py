"""SEED-Bench: multiple choice about images and videos, by question type.

The file is the authors' SEED-Bench.json: ``{"question_type": {name: id}, "questions": [{"question_id", "question",
"choice_a" to "choice_d", "answer", "data_id", "data_type", "question_type_id"}]}``. Of a video a frame is shown that
LLaVA's script has cut, named ``DATA_ID.jpg``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Entry, Outcomes, Question, Scores
from shellv_core.evaluation.benchmarks.scienceqa import LETTER_SUFFIX
from shellv_core.evaluation.choices import LETTERS, parse_choice
from shellv_core.evaluation.rows import check_overlap, read_document, require_fields
from shellv_core.evaluation.yes_no import wilson_interval

_FIELDS = ("question_id", "question", "choice_a", "choice_b", "choice_c", "choice_d", "answer", "data_id")


class SeedBench:
    """SEED-Bench's questions.

    Args:
        document: the content of its file.
        source: names the file in errors.

    Raises:
        EvaluationError: if a question lacks a field, its answer is none of A to D, or an id comes twice.
    """

    key: tuple[str, ...] = ("seed_bench",)
    max_new_tokens = 8

    def __init__(self, document: Mapping[str, Any], source: str = "questions") -> None:
        if not isinstance(document, dict) or not document.get("questions"):
            raise EvaluationError(f"{source}: needs an object with a list questions; is it SEED-Bench.json?")
        names = {str(value): name for name, value in document.get("question_type", {}).items()}
        questions = []
        self._truth: dict[str, int] = {}
        self._choices: dict[str, tuple[str, ...]] = {}
        self._groups: dict[str, list[str]] = {}
        for number, row in enumerate(document["questions"], start=1):
            place = f"{source}, question {number}"
            require_fields(row, _FIELDS, place, "a SEED-Bench question")
            key, answer = str(row["question_id"]), str(row["answer"])
            if answer not in ("A", "B", "C", "D"):
                raise EvaluationError(f"{place}: answer {answer!r} is none of A, B, C, D.")
            if key in self._truth:
                raise EvaluationError(f"{place}: question_id {key!r} comes twice.")
            kind = str(row.get("data_type", "image"))
            self._truth[key] = LETTERS.index(answer)
            self._choices[key] = tuple(str(row[f"choice_{letter}"]) for letter in "abcd")
            type_id = str(row.get("question_type_id", ""))
            for group in (kind, names.get(type_id, type_id)):
                if group:
                    self._groups.setdefault(group, []).append(key)
            options = "".join(f"\n{LETTERS[index]}. {choice}" for index, choice in enumerate(self._choices[key]))
            image = str(row["data_id"]) if kind == "image" else f"{Path(str(row['data_id'])).stem}.jpg"
            questions.append(Question(key, image, str(row["question"]) + options + LETTER_SUFFIX))
        self._questions = tuple(questions)

    @property
    def questions(self) -> Sequence[Question]:
        """All questions, in file order."""
        return self._questions

    def expected(self, question_id: str) -> str:
        """The right choice."""
        truth = self._truth[question_id]
        return f"{LETTERS[truth]}. {self._choices[question_id][truth]}"

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Accuracy with its 95 % interval, by data and question type, and counts; missing and unparsed are wrong."""
        num_unknown = check_overlap(self._truth, answers)
        labels = {key: parse_choice(answers[key], self._choices[key]) for key in self._truth if key in answers}
        right = {key: labels.get(key) == truth for key, truth in self._truth.items()}
        return {
            "accuracy": sum(right.values()) / len(right),
            "accuracy_interval": list(wilson_interval(sum(right.values()), len(right))),
            "by_group": {
                group: sum(right[key] for key in keys) / len(keys) for group, keys in sorted(self._groups.items())
            },
            "num_questions": len(right),
            "num_correct": sum(right.values()),
            "num_unparsed": sum(label is None for label in labels.values()),
            "num_missing": len(right) - len(labels),
            "num_unknown": num_unknown,
        }

    def outcomes(self, answers: Mapping[str, str]) -> dict[str, Outcomes]:
        """Accuracy, per question."""
        return {
            "seed_bench_accuracy": {
                key: (int(key in answers and parse_choice(answers[key], self._choices[key]) == truth), 1)
                for key, truth in self._truth.items()
            }
        }

    def upload(self, answers: Mapping[str, str]) -> bytes:
        """The leaderboard's JSON Lines of question_id and prediction, a letter; unparsed answers are left empty."""
        rows = []
        for key, choices in self._choices.items():
            label = parse_choice(answers.get(key, ""), choices)
            rows.append({"question_id": key, "prediction": "" if label is None else LETTERS[label]})
        return "".join(json.dumps(row) + "\n" for row in rows).encode()


ENTRIES = (
    Entry(
        name="seed-bench",
        summary="SEED-Bench: multiple choice about images and videos",
        questions="SEED-Bench.json",
        answers="rows with question_id and text, or the leaderboard's prediction\n"
        '{"question_id": "101669", "text": "C"}',
        published="https://huggingface.co/datasets/AILab-CVC/SEED-Bench",
        metrics="accuracy, by data type and question type",
        rules="strict alone: the authors rank the choices by likelihood",
        open=lambda questions: SeedBench(read_document(questions), str(questions)),
        upload=lambda benchmark, answers: benchmark.upload(answers),
    ),
)
