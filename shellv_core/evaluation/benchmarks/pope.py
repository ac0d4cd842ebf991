"""POPE: is there a such-and-such in the image? Three splits differ in how the absent objects are chosen.

Files are the authors': JSON Lines (or an array) of
``{"question_id": 1, "image": "....jpg", "text": "Is there a dog in the image?", "label": "yes"}``.
Answers of LLaVA's own run have the ids of its question file, which holds all three splits: see `Pope.read_answers`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Entry, Option, Outcomes, Question, Scores, name_of
from shellv_core.evaluation.rows import (
    ID_KEYS,
    align_texts,
    check_overlap,
    index_answers,
    index_texts,
    read_rows,
    require_fields,
    row_id,
)
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
    llava_questions: Path | None = None

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], split: str = "random", suffix: str = "", source: str = "questions"
    ) -> None:
        self.key: tuple[str, ...] = ("pope", split)
        questions: list[Question] = []
        self.truth: dict[str, bool] = {}
        for number, row in enumerate(rows, start=1):
            require_fields(row, ("question_id", "image", "text", "label"), f"{source}, row {number}", "a POPE question")
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
        self._suffix = suffix

    @property
    def questions(self) -> Sequence[Question]:
        """All questions, in file order."""
        return self._questions

    def expected(self, question_id: str) -> str:
        """The label."""
        return "yes" if self.truth[question_id] else "no"

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

    def read_answers(self, path: Path, llava_questions: Path | None = None) -> dict[str, str]:
        """Question id -> text of an answer file: rows with ids, or POPE's ``{"question", "answer"}`` in file order.

        Args:
            path: the answer file.
            llava_questions: LLaVA's question file, if the answers have its ids.
        """
        rows = read_rows(path)
        source = str(path)
        if rows and not any(key in row for row in rows for key in ID_KEYS) and all("question" in row for row in rows):
            asked = [question.prompt.removesuffix(self._suffix).strip() for question in self._questions]
            positions = align_texts(asked, [str(row["question"]).strip() for row in rows], source)
            return index_texts(
                (
                    (self._questions[position].question_id, {"answer": row.get("answer")})
                    for position, row in zip(positions, rows, strict=True)
                ),
                source,
            )
        if llava_questions is None:
            return index_answers(rows, source)
        ids = self._ids_of_llava(read_rows(llava_questions), str(llava_questions))
        named = [(row_id(row, number, source), row) for number, row in enumerate(rows, start=1)]
        return index_texts(((ids[key], row) for key, row in named if key in ids), source)

    def _ids_of_llava(self, rows: Sequence[Mapping[str, Any]], source: str) -> dict[str, str]:
        """Ids of LLaVA's question file -> ours, for the one of its categories that has most of our questions."""
        ours = {
            (question.image, question.prompt.removesuffix(self._suffix).strip()): question.question_id
            for question in self._questions
        }
        categories: dict[str, dict[str, str]] = defaultdict(dict)
        for number, row in enumerate(rows, start=1):
            require_fields(
                row,
                ("question_id", "image", "text", "category"),
                f"{source}, row {number}",
                "a question of LLaVA's POPE file",
            )
            key = str(row["image"]), str(row["text"]).split("\n", 1)[0].strip()
            if key in ours:
                categories[str(row["category"])][str(row["question_id"])] = ours[key]
        if not categories:
            raise EvaluationError(f"{source} asks none of the POPE questions; is it LLaVA's llava_pope_test.jsonl?")
        split = self.key[-1]
        return categories[split] if split in categories else max(categories.values(), key=len)


def _open(questions: Path, split: str = "auto", llava_questions: Path | None = None) -> Pope:
    named = next((name for name in SPLITS if name in questions.name), SPLITS[0])
    pope = Pope(read_rows(questions), named if split == "auto" else split, source=str(questions))
    pope.llava_questions = llava_questions
    return pope


ENTRIES = (
    Entry(
        name="pope",
        summary="POPE: yes/no questions about objects (coco, aokvqa and gqa files; three splits)",
        questions="one split's file, JSON Lines or a JSON array of question_id, image, text, label",
        answers="rows with question_id and text in any order, or question and answer in the order of the questions\n"
        '{"question_id": 1, "text": "Yes"} or {"question": "Is there a dog in the image?", "answer": "Yes"}',
        published="https://github.com/RUCAIBox/POPE, output/coco and output/seem",
        metrics="accuracy, precision, recall, F1, yes ratio; yes is positive",
        rules="authors: no only by the words No, no, not in the first sentence, else yes; strict: unparsed",
        open=_open,
        read=lambda pope, path: pope.read_answers(path, pope.llava_questions),
        options=(
            Option("split", "which split it is, by default the one in the file's name", ("auto", *SPLITS)),
            Option("llava_questions", "LLaVA's llava_pope_test.jsonl, if the answers have its ids"),
        ),
    ),
)
