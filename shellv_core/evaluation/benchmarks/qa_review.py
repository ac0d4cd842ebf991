"""GPT-assisted review: a judge scores two assistants' answers about an image (LLaVA's qa90, LLaVA-Bench).

Questions are the authors': ``{"question_id", "image", "text", "category"}``. The first assistant is the reference
(GPT-4 on captions and boxes), the second the model; both get 1 to 10. Reviews are LLaVA's ``{"question_id",
"category", "content", "tuple": [8, 6]}`` or Vicuna's ``{"question_id", "text", "score": [9.0, 8.5]}``.

The judge's instructions are this project's words unless the authors' rule.json is given; only with it are figures
comparable with theirs.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Entry, Outcomes, Question, Scores
from shellv_core.evaluation.rows import check_overlap, index_answers, read_document, read_rows, require_fields, row_id

ALL = "all"
UNREAD = (-1.0, -1.0)
_NUMBER = re.compile(r"(?<![\w.-])(\d+(?:\.\d+)?)(?!\w|\.\d|/\d{3})(?:/10)?")
_INSTRUCTIONS = (
    "Two assistants have answered a user's question about an image. The context above describes the image: sentences,"
    " and objects with boxes whose corners x1, y1, x2, y2 are shares of its size. Score each answer from 1 (bad) to 10"
    " (perfect) for being helpful, relevant, right and detailed, whichever comes first.\n"
    "Write the two scores alone on the first line, with a space between them, that of assistant 1 first. Give your"
    " reasons from the second line on."
)


class QaReview:
    """Questions whose answers a judge compares with a reference's.

    Args:
        rows: the question file's rows; without them only reviews can be scored.
        references: answers of the first assistant by question id.
        contexts: what each image shows, by image name.
        instructions: category -> what the judge is told; ``default`` for the others.
        source: names the file in errors.

    Raises:
        EvaluationError: if a row lacks a field or an id comes twice.
    """

    key: tuple[str, ...] = ("qa_review",)
    max_new_tokens = 512

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]] = (),
        references: Mapping[str, str] | None = None,
        contexts: Mapping[str, str] | None = None,
        instructions: Mapping[str, str] | None = None,
        source: str = "questions",
    ) -> None:
        self._references = references or {}
        self._contexts = contexts or {}
        self._instructions = instructions or {"default": _INSTRUCTIONS}
        questions = []
        self._categories: dict[str, str] = {}
        for number, row in enumerate(rows, start=1):
            require_fields(row, ("question_id", "image", "text"), f"{source}, row {number}", "a review question")
            key = str(row["question_id"])
            if key in self._categories:
                raise EvaluationError(f"{source}, row {number}: question_id {key!r} comes twice.")
            self._categories[key] = str(row.get("category", ""))
            questions.append(Question(key, str(row["image"]), str(row["text"])))
        self._questions = tuple(questions)

    @property
    def questions(self) -> Sequence[Question]:
        """All questions, in file order."""
        return self._questions

    def judge_questions(self, answers: Mapping[str, str], judgments: Mapping[str, str]) -> Sequence[Question]:
        """One for each answer that has a reference and a context.

        Raises:
            EvaluationError: if a question has none of them.
        """
        asked = []
        for question in self._questions:
            key = question.question_id
            if key not in answers:
                continue
            for name, there in (
                ("reference answer", key in self._references),
                ("context", question.image in self._contexts),
            ):
                if not there:
                    raise EvaluationError(f"question {key!r} about {question.image!r} has no {name} for the judge.")
            category = self._categories[key]
            instructions = self._instructions.get(category) or self._instructions.get("default", _INSTRUCTIONS)
            parts = (
                ("Context", self._contexts[question.image]),
                ("Question", question.prompt),
                ("Assistant 1", f"{self._references[key]}\n\n[End of Assistant 1]"),
                ("Assistant 2", f"{answers[key]}\n\n[End of Assistant 2]"),
                ("System", instructions),
            )
            asked.append(Question(key, "", "\n\n".join(f"[{title}]\n{text}" for title, text in parts)))
        return asked

    def expected(self, question_id: str) -> str:
        """The reference's answer, where it is given."""
        return self._references.get(question_id, "")

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Scores of the reviews, for ``all`` and each category of the questions.

        Returns:
            for each: mean_first, mean_second (1 to 10), relative_score (second / first in percent, one decimal), win,
            tie and loss of the second, and counts, over the reviews that can be read; under `author_rule` means and
            relative score where a review that the authors' rule cannot read counts as -1 for both.
        """
        num_unknown = check_overlap(self._categories, answers) if self._categories else 0
        keys = list(self._categories) or list(answers)
        groups: dict[str, list[str]] = {ALL: keys}
        for key in keys:
            if self._categories.get(key):
                groups.setdefault(self._categories[key], []).append(key)
        scores: Scores = {name: self._score_group(group, answers) for name, group in sorted(groups.items())}
        return {**scores, "num_unknown": num_unknown}

    def outcomes(self, answers: Mapping[str, str]) -> dict[str, Outcomes]:
        """Relative score: hundredths of the second's score over those of the first's, of readable reviews."""
        pairs = {key: parse_review(answers[key]) for key in self._categories or answers if key in answers}
        return {
            "qa_review_relative_score": {
                key: (round(100 * pair[1]), round(100 * pair[0])) for key, pair in pairs.items() if pair is not None
            }
        }

    def read_answers(self, path: Path) -> dict[str, str]:
        """Reviews by question id: the judge's words, after the scores that the file has read from them, if any.

        Categories of the reviews stand in for those of a question file that was not given.
        """
        rows = read_rows(path)
        reviews: dict[str, str] = {}
        categories: dict[str, str] = {}
        for number, row in enumerate(rows, start=1):
            key = str(row["question_id"]) if "question_id" in row else row_id(row, number, str(path))
            words = next((row[name] for name in ("content", "text", "answer") if isinstance(row.get(name), str)), None)
            pair = row.get("tuple", row.get("score"))
            if pair is None and words is None:
                raise EvaluationError(
                    f"{path}, row {number}: needs a tuple or score of two numbers, or content or text."
                )
            if pair is not None:
                if (
                    not isinstance(pair, list)
                    or len(pair) != 2
                    or not all(isinstance(value, int | float) and not isinstance(value, bool) for value in pair)
                ):
                    raise EvaluationError(f"{path}, row {number}: tuple or score {pair!r} is no list of two numbers.")
                if tuple(pair) != UNREAD:
                    words = f"{pair[0]} {pair[1]}\n{words or ''}"
            if key in reviews:
                raise EvaluationError(
                    f"{path}, row {number}: question_id {key!r} is reviewed twice; keep one row of it."
                )
            reviews[key] = words or ""
            categories[key] = str(row.get("category", ""))
        if not self._questions:
            self._categories = categories
        return reviews

    def _score_group(self, keys: Sequence[str], answers: Mapping[str, str]) -> Scores:
        reviewed = [answers[key] for key in keys if key in answers]
        pairs = [pair for pair in map(parse_review, reviewed) if pair is not None]
        author = [_review_by_author(text) for text in reviewed]
        return {
            **_means(pairs),
            "win": sum(second > first for first, second in pairs),
            "tie": sum(second == first for first, second in pairs),
            "loss": sum(second < first for first, second in pairs),
            "num_reviews": len(reviewed),
            "num_missing": len(keys) - len(reviewed),
            "num_unparsed": len(reviewed) - len(pairs),
            "author_rule": _means([(round(first, 3), round(second, 3)) for first, second in [_mean(author)]]),
        }


def parse_review(text: str) -> tuple[float, float] | None:
    """The two scores of a review's first line that is not empty, None unless it has just two, from 0 to 10."""
    line = next((line for line in text.split("\n") if line.strip()), "")
    numbers = [float(number) for number in _NUMBER.findall(line)]
    if len(numbers) != 2 or not all(0 <= number <= 10 for number in numbers):
        return None
    return numbers[0], numbers[1]


def _review_by_author(text: str) -> tuple[float, float]:
    """The first line's two fields between single spaces, commas being spaces; all else is -1 for both."""
    fields = text.split("\n")[0].replace(",", " ").split(" ")
    try:
        first, second = map(float, fields)
    except ValueError:
        return UNREAD
    return first, second


def _mean(pairs: Sequence[tuple[float, float]]) -> tuple[float, float]:
    if not pairs:
        return 0.0, 0.0
    return sum(first for first, _ in pairs) / len(pairs), sum(second for _, second in pairs) / len(pairs)


def _means(pairs: Sequence[tuple[float, float]]) -> Scores:
    first, second = _mean(pairs)
    return {
        "mean_first": first,
        "mean_second": second,
        "relative_score": round(100 * second / first, 1) if first else 0.0,
    }


def read_contexts(path: Path) -> dict[str, str]:
    """What each image shows, of LLaVA's context file: captions and boxes (qa90) or one caption (LLaVA-Bench)."""
    contexts = {}
    for number, row in enumerate(read_rows(path), start=1):
        require_fields(row, ("image",), f"{path}, row {number}", "a context")
        told = row.get("captions", row.get("caption"))
        if told is None:
            raise EvaluationError(f"{path}, row {number}: has neither captions nor caption.")
        boxes = [f"{each['category']}: {each['bbox']}" for each in row.get("instances", ())]
        sentences = "\n".join(told) if isinstance(told, list) else str(told)
        contexts[str(row["image"])] = sentences + ("\n\n" + "\n".join(boxes) if boxes else "")
    return contexts


def read_instructions(path: Path) -> dict[str, str]:
    """Category -> instructions of the authors' rule.json."""
    rules = read_document(path)
    if not isinstance(rules, dict) or not all(isinstance(rule, dict) and "prompt" in rule for rule in rules.values()):
        raise EvaluationError(f"{path}: needs an object of category -> {{role, prompt}}, as in LLaVA's rule.json.")
    return {category: str(rule["prompt"]) for category, rule in rules.items()}


def _open(
    questions: Path | None,
    references: Path | None = None,
    contexts: Path | None = None,
    instructions: Path | None = None,
) -> QaReview:
    return QaReview(
        () if questions is None else read_rows(questions),
        None if references is None else index_answers(read_rows(references), str(references)),
        None if contexts is None else read_contexts(contexts),
        None if instructions is None else read_instructions(instructions),
        str(questions),
    )


ENTRIES = (
    Entry(
        name="qa-review",
        summary="GPT review: two assistants' answers that a judge has compared (LLaVA's qa90, LLaVA-Bench)",
        questions="rows of question_id, image, text, category; needed only for missing reviews and categories",
        answers="review files of LLaVA (tuple, category) and Vicuna (score), or rows with question_id and text\n"
        '{"question_id": 0, "category": "conv", "content": "8 6\\nThe first ...", "tuple": [8.0, 6.0]}',
        published="https://github.com/haotian-liu/LLaVA, playground/data and llava/eval/table;"
        " https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild",
        metrics="by category: mean of both, relative score, win / tie / loss, unparsed",
        rules="authors: a review that cannot be read averages in as -1; strict: left out and counted, commas and spaces"
        " may vary",
        open=_open,
        read=lambda benchmark, path: benchmark.read_answers(path),
        questions_required=False,
    ),
)
