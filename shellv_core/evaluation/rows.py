"""Question and answer files: JSON Lines or a JSON array of objects, joined by id and never blindly by position."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shellv_core.errors import EvaluationError

_SPACE = re.compile(r"\s*")
ID_KEYS = ("question_id", "id", "questionId")
ANSWER_KEYS = ("text", "answer", "response", "prediction")


def read_text(path: Path) -> str:
    """Content of a UTF-8 file, with or without a byte order mark.

    Raises:
        EvaluationError: if the file cannot be read.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise EvaluationError(f"cannot read {path}: {reason}.") from None


def read_document(path: Path) -> Any:
    """The value of a JSON file; of JSON Lines with several rows, or of objects one behind the other, their list."""
    values = _parse_values(read_text(path), str(path))
    return values[0][1] if len(values) == 1 else [value for _, value in values]


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file or a JSON array of objects; blank lines are skipped.

    Raises:
        EvaluationError: if the file cannot be read, or naming the line that is not a JSON object.
    """
    return parse_rows(read_text(path), str(path))


def parse_rows(content: str, source: str) -> list[dict[str, Any]]:
    """Parse the content of a rows file; `source` names it in errors."""
    values = _parse_values(content, source)
    if len(values) == 1 and isinstance(values[0][1], list):
        values = list(enumerate(values[0][1], start=1))
    for number, row in values:
        if not isinstance(row, dict):
            raise EvaluationError(f"{source}, row {number}: {row!r} is not a JSON object.")
    return [row for _, row in values]


def read_answers(path: Path) -> dict[str, str]:
    """Question id -> text of an answer file; see `index_answers`."""
    return index_answers(read_rows(path), source=str(path))


def index_answers(rows: Iterable[Mapping[str, Any]], source: str = "answers") -> dict[str, str]:
    """Map question ids to answer texts.

    A row needs `question_id` or `id` (a number or a string) and `text`, `answer` or `response`.

    Raises:
        EvaluationError: if a row lacks one of them, or an id comes twice.
    """
    return index_texts(((row_id(row, number, source), row) for number, row in enumerate(rows, start=1)), source)


def index_texts(rows: Iterable[tuple[str, Mapping[str, Any]]], source: str = "answers") -> dict[str, str]:
    """Map ids to the texts of their rows.

    Raises:
        EvaluationError: if a row has no text, or an id comes twice.
    """
    answers: dict[str, str] = {}
    for number, (question_id, row) in enumerate(rows, start=1):
        text = row_text(row, number, source)
        if question_id in answers:
            raise EvaluationError(
                f"{source}, row {number}: question_id {question_id!r} is answered twice; keep one row for each of them."
            )
        answers[question_id] = text
    return answers


def row_id(row: Mapping[str, Any], number: int, source: str) -> str:
    """The question's id in an answer row."""
    question_id = next((row[key] for key in ID_KEYS if row.get(key) is not None), None)
    if question_id is None:
        raise EvaluationError(
            f"{source}, row {number}: no 'question_id' or 'id' (keys: {', '.join(sorted(map(str, row))) or 'none'})."
            " Answers are joined to questions by id, because joining them by position gives wrong scores as soon as"
            " one row is missing or moved; add the question_id of the question file to every row."
        )
    return str(question_id)


def row_text(row: Mapping[str, Any], number: int, source: str) -> str:
    """The text of an answer row."""
    text = next((row[key] for key in ANSWER_KEYS if key in row), None)
    if not isinstance(text, str):
        raise EvaluationError(
            f"{source}, row {number}: needs a string under 'text', 'answer' or 'response', got {text!r}."
        )
    return text


def align_texts(asked: Sequence[str], said: Sequence[str], source: str) -> list[int]:
    """Positions in `asked` of the texts in `said`, which repeats them in order, or all in reverse, and may leave some
    out: for answer files that name no id but repeat every question.

    Raises:
        EvaluationError: if a text is not there in that order, or the texts fit in more than one way.
    """
    for order in (list(said), list(reversed(said))):
        first = _embed(asked, order)
        if len(first) < len(order):
            continue
        last = [len(asked) - 1 - position for position in _embed(asked[::-1], order[::-1])][::-1]
        differing = next(
            (index for index, pair in enumerate(zip(first, last, strict=True)) if pair[0] != pair[1]), None
        )
        if differing is None:
            return first if order == list(said) else first[::-1]
        raise EvaluationError(
            f"{source}: rows have no question_id and are missing, and {order[differing]!r} can then stand for more"
            " than one question. Answer every question, or add the question_id to every row."
        )
    failed = len(_embed(asked, said))
    raise EvaluationError(
        f"{source}, row {failed + 1}: {said[failed]!r} is not the question that the question file has next. Rows"
        " without a question_id must repeat the questions in the file's order; add the question_id to every row."
    )


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


def require_fields(row: Mapping[str, Any], fields: Iterable[str], place: str, kind: str) -> None:
    """Check that a question row has its fields; `kind` names the benchmark.

    Raises:
        EvaluationError: naming what it lacks.
    """
    fields = tuple(fields)
    lacking = [field for field in fields if field not in row]
    if lacking:
        raise EvaluationError(
            f"{place}: lacks {', '.join(lacking)}; {kind} has {', '.join(fields[:-1])} and {fields[-1]}."
        )


def _embed(asked: Sequence[str], said: Sequence[str]) -> list[int]:
    """Leftmost positions of `said` as a subsequence of `asked`, as far as it is one."""
    positions: list[int] = []
    for position, text in enumerate(asked):
        if len(positions) < len(said) and text == said[len(positions)]:
            positions.append(position)
    return positions


def _parse_values(content: str, source: str) -> list[tuple[int, Any]]:
    """Line or row number and value of each JSON value in `content`."""
    if content.lstrip().startswith("["):
        try:
            return [(1, json.loads(content))]
        except json.JSONDecodeError as error:
            raise EvaluationError(f"{source} is not a valid JSON array: {error}.") from None
    values = []
    # Not splitlines(): answers may hold U+2028 and the like inside a JSON string.
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            values.append((number, json.loads(line)))
        except json.JSONDecodeError as error:
            objects = _parse_objects(content)
            if objects is None:
                raise EvaluationError(f"{source}, line {number} is not valid JSON: {error}.") from None
            return objects
    return values


def _parse_objects(content: str) -> list[tuple[int, Any]] | None:
    """Values that span lines, one behind the other; None where it is no such file."""
    decoder = json.JSONDecoder()
    values: list[tuple[int, Any]] = []
    content = content.strip()
    position = 0
    while position < len(content):
        start = position + len(_SPACE.match(content, position).group())  # type: ignore[union-attr]
        try:
            value, position = decoder.raw_decode(content, start)
        except json.JSONDecodeError:
            return None
        values.append((len(values) + 1, value))
    return values
