"""Question and answer files: JSON Lines or a JSON array of objects, joined by `question_id` and never by position."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from shellv_core.errors import EvaluationError

ANSWER_KEYS = ("text", "answer")


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file or a JSON array of objects; blank lines are skipped.

    Raises:
        EvaluationError: if the file cannot be read, or naming the line that is not a JSON object.
    """
    try:
        content = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise EvaluationError(f"cannot read {path}: {reason}.") from None
    return parse_rows(content, str(path))


def parse_rows(content: str, source: str) -> list[dict[str, Any]]:
    """Parse the content of a rows file; `source` names it in errors."""
    if content.lstrip().startswith("["):
        try:
            rows = json.loads(content)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{source} is not a valid JSON array: {error}.") from None
        numbered: Iterable[tuple[int, Any]] = enumerate(rows, start=1)
    else:
        numbered = _parse_lines(content, source)
    result = []
    for number, row in numbered:
        if not isinstance(row, dict):
            raise EvaluationError(f"{source}, row {number}: {row!r} is not a JSON object.")
        result.append(row)
    return result


def index_answers(rows: Iterable[Mapping[str, Any]], source: str = "answers") -> dict[str, str]:
    """Map question ids to answer texts.

    A row needs `question_id` (a number or a string) and `text` (or `answer`).

    Raises:
        EvaluationError: if a row lacks one of them, or an id comes twice.
    """
    answers: dict[str, str] = {}
    for number, row in enumerate(rows, start=1):
        if "question_id" not in row:
            raise EvaluationError(
                f"{source}, row {number}: no 'question_id' (keys: {', '.join(sorted(map(str, row))) or 'none'})."
                " Answers are joined to questions by id, because joining them by position gives wrong scores as soon as"
                " one row is missing or moved; add the question_id of the question file to every row."
            )
        text = next((row[key] for key in ANSWER_KEYS if key in row), None)
        if not isinstance(text, str):
            raise EvaluationError(f"{source}, row {number}: needs a string under 'text' or 'answer', got {text!r}.")
        question_id = str(row["question_id"])
        if question_id in answers:
            raise EvaluationError(
                f"{source}, row {number}: question_id {question_id!r} is answered twice; keep one row for each of them."
            )
        answers[question_id] = text
    return answers


def check_overlap(question_ids: Iterable[str], answers: Mapping[str, str]) -> int:
    """The number of answers to questions that were not asked.

    Raises:
        EvaluationError: if there are answers and not one belongs to a question.
    """
    asked = dict.fromkeys(question_ids)
    unknown = [question_id for question_id in answers if question_id not in asked]
    if answers and len(unknown) == len(answers):
        raise EvaluationError(
            f"none of the {len(answers)} answers belongs to one of the {len(asked)} questions: the answers have ids"
            f" like {unknown[0]!r}, the questions like {next(iter(asked), 'none')!r}. Do the files belong together?"
        )
    return len(unknown)


def _parse_lines(content: str, source: str) -> Iterable[tuple[int, Any]]:
    # Not splitlines(): answers may hold U+2028 and the like inside a JSON string.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            yield number, json.loads(line)
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{source}, line {number} is not valid JSON: {error}.") from None
