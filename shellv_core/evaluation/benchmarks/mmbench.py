"""MMBench: multiple choice, asked once for each rotation of the choices; a question counts if all are right.

Files are the authors' TSV: index, question, hint, A to D, answer (not in the test split), category, image (base64).
Where a file has its rotations already, as rows whose index is a million higher each time, they are taken as they are.
"""

from __future__ import annotations

import base64
import binascii
import csv
import io
import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Entry, Option, Outcomes, Question, Scores
from shellv_core.evaluation.benchmarks.scienceqa import LETTER_SUFFIX
from shellv_core.evaluation.choices import LETTERS, parse_choice
from shellv_core.evaluation.rows import check_overlap, index_texts, read_rows, read_text, require_fields, row_id
from shellv_core.evaluation.yes_no import wilson_interval

ROUNDS = ("circular", "single")
_ROTATION = 1_000_000
_EMPTY = ("", "nan", "none")


class MmBench:
    """MMBench's questions; the id of one rotation is ``INDEX/ROUND``, round 0 being the file's own order.

    Args:
        rows: the TSV's rows.
        rounds: ``circular`` or ``single``.
        source: names the file in errors.

    Raises:
        EvaluationError: if a row lacks a field, has no choices, or an index comes twice.
    """

    key: tuple[str, ...] = ("mmbench",)
    max_new_tokens = 8

    def __init__(self, rows: Iterable[Mapping[str, str]], rounds: str = ROUNDS[0], source: str = "questions") -> None:
        self.rows: dict[str, Mapping[str, str]] = {}
        self._choices: dict[str, tuple[str, ...]] = {}
        self._truth: dict[str, int] = {}
        self._groups: dict[str, list[str]] = {}
        questions = []
        for number, row in enumerate(rows, start=1):
            place = f"{source}, row {number}"
            require_fields(row, ("index", "question", "A", "B"), place, "an MMBench question")
            index = row["index"].strip()
            if not index.isdigit():
                raise EvaluationError(f"{place}: index {index!r} is no number.")
            if index in self.rows:
                raise EvaluationError(f"{place}: index {index} comes twice.")
            self.rows[index] = row
            letters = [letter for letter in LETTERS[:4] if (row.get(letter) or "").strip().lower() not in _EMPTY]
            choices = [row[letter].strip() for letter in letters]
            answer = (row.get("answer") or "").strip()
            if answer and answer not in letters:
                raise EvaluationError(f"{place}: answer {answer!r} is none of its choices {', '.join(letters)}.")
            hint = (row.get("hint") or "").strip()
            text = row["question"] if hint.lower() in _EMPTY else f"{hint}\n{row['question']}"
            for turn in range(len(choices) if rounds == ROUNDS[0] and int(index) < _ROTATION else 1):
                turned = choices[turn:] + choices[:turn]
                key = f"{index}/{turn}"
                self._choices[key] = tuple(turned)
                if answer:
                    self._truth[key] = (letters.index(answer) - turn) % len(choices)
                self._groups.setdefault(str(int(index) % _ROTATION), []).append(key)
                options = "".join(f"\n{LETTERS[place]}. {choice}" for place, choice in enumerate(turned))
                questions.append(Question(key, f"mmbench/{index}.jpg", text + options + LETTER_SUFFIX))
        if not questions:
            raise EvaluationError(f"{source} holds no questions.")
        self._questions = tuple(questions)

    @property
    def questions(self) -> Sequence[Question]:
        """All rotations of all questions, in file order."""
        return self._questions

    def image(self, name: str) -> bytes:
        """The encoded image of that name, which the file holds.

        Raises:
            EvaluationError: if it holds none.
        """
        index = name.removeprefix("mmbench/").removesuffix(".jpg")
        content = self.rows[index].get("image", "") if index in self.rows else ""
        # A rotation may name the row that has the image.
        if content.isdigit() and content in self.rows:
            content = self.rows[content].get("image", "")
        try:
            image = base64.b64decode(content, validate=True)
        except (binascii.Error, ValueError):
            image = b""
        if not image:
            raise EvaluationError(f"the MMBench file holds no image for index {index}.")
        return image

    def expected(self, question_id: str) -> str:
        """The right choice of the rotation; empty in the test split."""
        truth = self._truth.get(question_id)
        return "" if truth is None else f"{LETTERS[truth]}. {self._choices[question_id][truth]}"

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Scores where the file has the right answers.

        Returns:
            circular_accuracy (all rotations right / questions), by category too; accuracy of the first rotation with
            its 95 % interval; counts. Without right answers the counts alone: the test server scores the upload.
        """
        num_unknown = check_overlap(self._choices, answers)
        right = self._right(answers)
        result: Scores = {
            "num_questions": len(self._groups),
            "num_rotations": len(self._choices),
            "num_missing": sum(key not in answers for key in self._choices),
            "num_unparsed": sum(
                key in answers and parse_choice(answers[key], choices) is None for key, choices in self._choices.items()
            ),
            "num_unknown": num_unknown,
        }
        scored = {name: keys for name, keys in self._groups.items() if all(key in self._truth for key in keys)}
        if not scored:
            return result
        categories: dict[str, list[bool]] = {}
        for keys in scored.values():
            category = (self.rows[keys[0].split("/")[0]].get("category") or "").strip()
            if category:
                categories.setdefault(category, []).append(all(right[key] for key in keys))
        first = sum(right[keys[0]] for keys in scored.values())
        return {
            "circular_accuracy": sum(all(right[key] for key in keys) for keys in scored.values()) / len(scored),
            "accuracy": first / len(scored),
            "accuracy_interval": list(wilson_interval(first, len(scored))),
            "circular_by_category": {name: sum(values) / len(values) for name, values in sorted(categories.items())},
            **result,
        }

    def outcomes(self, answers: Mapping[str, str]) -> dict[str, Outcomes]:
        """Circular accuracy, per question."""
        right = self._right(answers)
        return {
            "mmbench_circular_accuracy": {
                name: (int(all(right[key] for key in keys)), 1)
                for name, keys in self._groups.items()
                if all(key in right for key in keys)
            }
        }

    def read_answers(self, path: Path) -> dict[str, str]:
        """Answers by rotation, of rows with ids or of LLaVA's, whose question_id is the index beside a round_id."""
        named = []
        for number, row in enumerate(read_rows(path), start=1):
            key = row_id(row, number, str(path))
            named.append((key if "/" in key else f"{key}/{int(row.get('round_id', 0))}", row))
        return index_texts(named, str(path))

    def upload(self, answers: Mapping[str, str]) -> bytes:
        """The test server's workbook: index, question, choices and the answer to the first rotation.

        Raises:
            EvaluationError: if openpyxl is not installed.
        """
        try:
            from openpyxl import Workbook
        except ImportError:
            raise EvaluationError(
                "MMBench's upload is an Excel workbook, which needs openpyxl; run: pip install 'shellv[mmbench]'."
            ) from None
        columns = ("index", "question", *LETTERS[:4])
        book = Workbook(write_only=True)
        sheet = book.create_sheet("Sheet1")
        sheet.append([*columns, "prediction"])
        for index, row in self.rows.items():
            sheet.append([int(index), *(row.get(name) or None for name in columns[1:]), answers.get(f"{index}/0")])
        content = io.BytesIO()
        book.save(content)
        return content.getvalue()

    def _right(self, answers: Mapping[str, str]) -> dict[str, bool]:
        return {
            key: key in answers and parse_choice(answers[key], self._choices[key]) == truth
            for key, truth in self._truth.items()
        }


def read_tsv(path: Path) -> list[dict[str, str]]:
    """Rows of a TSV file with a heading; fields may hold line breaks between quotes."""
    # Images are fields of megabytes.
    csv.field_size_limit(sys.maxsize)
    return list(csv.DictReader(io.StringIO(read_text(path), newline=""), delimiter="\t"))


ENTRIES = (
    Entry(
        name="mmbench",
        summary="MMBench: multiple choice under all rotations of the choices",
        questions="mmbench_dev_20230712.tsv or another of its files",
        answers="rows with INDEX/ROUND and text, or LLaVA's with the index and a round_id (0 where there is none)\n"
        '{"question_id": "241/0", "text": "B"} or {"question_id": 241, "round_id": 0, "text": "B"}',
        published="https://github.com/open-compass/MMBench",
        metrics="circular accuracy, also by category; accuracy of the first rotation; the test split is scored by the"
        " server",
        rules="strict alone: the authors let a judge match answers without a letter",
        open=lambda questions, rounds=ROUNDS[0]: MmBench(read_tsv(questions), rounds, str(questions)),
        read=lambda benchmark, path: benchmark.read_answers(path),
        options=(Option("rounds", "all rotations of the choices, or the file's order alone", ROUNDS),),
        upload=lambda benchmark, answers: benchmark.upload(answers),
    ),
)
