"""POPE: is there a such-and-such in the image? Three splits differ in how the absent objects are chosen.

Files are the authors': JSON Lines (or an array) of
``{"question_id": 1, "image": "....jpg", "text": "Is there a dog in the image?", "label": "yes"}``.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Outcomes, Question, Scores, name_of
from shellv_core.evaluation.rows import check_overlap
from shellv_core.evaluation.yes_no import parse_pope_author, parse_strict, score_yes_no

SPLITS = ("random", "popular", "adversarial")


class Pope:
    """One POPE split.

    Args:
        rows: the question file's rows.
        split: its name.
        suffix: text appended to every question, for models that were trained to expect it.
        source: names the file in errors.

    Raises:
        EvaluationError: if a row lacks a field, a label is neither yes nor no, or a question id comes twice.
    """

    max_new_tokens = 4

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], split: str = "random", suffix: str = "", source: str = "questions"
    ) -> None:
        self.key: tuple[str, ...] = ("pope", split)
        questions: list[Question] = []
        self.truth: dict[str, bool] = {}
        for number, row in enumerate(rows, start=1):
            lacking = [field for field in ("question_id", "image", "text", "label") if field not in row]
            if lacking:
                raise EvaluationError(
                    f"{source}, row {number}: lacks {', '.join(lacking)}; a POPE question has question_id, image, text"
                    " and label."
                )
            label = str(row["label"]).strip().lower()
            if label not in ("yes", "no"):
                raise EvaluationError(f"{source}, row {number}: label {row['label']!r} is neither 'yes' nor 'no'.")
            question_id = str(row["question_id"])
            if question_id in self.truth:
                raise EvaluationError(f"{source}, row {number}: question_id {question_id!r} comes twice.")
            self.truth[question_id] = label == "yes"
            questions.append(Question(question_id, str(row["image"]), str(row["text"]) + suffix))
        if not questions:
            raise EvaluationError(f"{source} holds no questions.")
        self._questions = tuple(questions)

    @property
    def questions(self) -> Sequence[Question]:
        """All questions, in file order."""
        return self._questions

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Strict scores, and under `author_rule` those by the authors' rule; see `score_yes_no`."""
        num_unknown = check_overlap(self.truth, answers)
        strict = score_yes_no(self.truth, {key: parse_strict(text) for key, text in answers.items()})
        author = score_yes_no(self.truth, {key: parse_pope_author(text) for key, text in answers.items()})
        return {**strict, "num_unknown": num_unknown, "author_rule": author}

    def outcomes(self, answers: Mapping[str, str]) -> dict[str, Outcomes]:
        """Accuracy by the strict rule, per question."""
        right = {key: int(key in answers and parse_strict(answers[key]) is label) for key, label in self.truth.items()}
        return {f"{name_of(self)}_accuracy": {key: (event, 1) for key, event in right.items()}}
