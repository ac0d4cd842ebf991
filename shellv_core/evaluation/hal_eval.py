"""Hal-Eval, discriminative: does this caption match the image?

Files are the authors': a JSON array (or JSON Lines) of ``{"image" or "image_path", "key"?, "caption", "hal_caption":
[{"type": "Objective Hallucination", "caption": ...}, ...]}``. Each item asks about its true caption and about one
hallucinated caption of each type.

Question ids are ``ITEM/KIND``. ITEM is the item's `key` if it has one, else its image path as written in the file;
the second item with the same name gets ``#2`` behind it, the third ``#3``. KIND is gt, object, attribute, relation or
event.
An answer file holds ``{"question_id": "val2014/COCO_val2014_000000462565.jpg/gt", "text": "yes"}`` rows, in any order.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Outcomes, Question, Scores
from shellv_core.evaluation.rows import check_overlap
from shellv_core.evaluation.yes_no import Label, parse_hal_eval_author, parse_strict, score_yes_no

TYPES = ("object", "attribute", "relation", "event")
TRUE_CAPTION = "gt"
TYPE_NAMES = {
    "objective hallucination": "object",
    "attributive hallucination": "attribute",
    "spatial relationship hallucination": "relation",
    "event hallucination": "event",
    **{name: name for name in TYPES},
}
OFFICIAL_PROMPT = (
    "```{caption}```. Does the caption delimited by triple backticks match the image exactly?"
    ' If so, return "yes". If not, return "no".'
)


class HalEval:
    """The discriminative questions of a Hal-Eval file.

    Args:
        rows: the file's items.
        prompt: question with ``{caption}`` in the caption's place.
        source: names the file in errors.

    Raises:
        EvaluationError: if an item lacks a field or has an unknown hallucination type.
    """

    key: tuple[str, ...] = ("hal_eval",)
    max_new_tokens = 4

    def __init__(
        self, rows: Iterable[Mapping[str, Any]], prompt: str = OFFICIAL_PROMPT, source: str = "questions"
    ) -> None:
        if "{caption}" not in prompt:
            raise EvaluationError(f"the Hal-Eval prompt {prompt!r} has no {{caption}} in it.")
        self.num_empty_captions = 0
        questions: list[Question] = []
        self._items: dict[str, list[str]] = {}
        seen: Counter[str] = Counter()
        for number, row in enumerate(rows, start=1):
            image, captions = self._read(row, f"{source}, item {number}")
            name = str(row.get("key") or image)
            seen[name] += 1
            item = name if seen[name] == 1 else f"{name}#{seen[name]}"
            self._items[item] = [kind for kind, _ in captions]
            questions += [
                Question(f"{item}/{kind}", image, prompt.replace("{caption}", caption)) for kind, caption in captions
            ]
        if not questions:
            raise EvaluationError(f"{source} holds no items.")
        self._questions = tuple(questions)

    @property
    def questions(self) -> Sequence[Question]:
        """All questions: item by item, the true caption first."""
        return self._questions

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Scores by hallucination type, each under the strict rule and, in `author_rule`, the authors'.

        Per type the positives are the true captions of the items that have a caption of this type, the negatives those
        captions; chance is 1/2. Answers that say neither are wrong in the main figures and left out in `parsed_only`.
        """
        num_unknown = check_overlap((question.question_id for question in self._questions), answers)
        strict: dict[str, Label] = {key: parse_strict(text) for key, text in answers.items()}
        author: dict[str, Label] = {key: parse_hal_eval_author(text) for key, text in answers.items()}
        scores: Scores = {}
        for kind in TYPES:
            truth = self._truth(kind)
            if truth:
                scores[kind] = {
                    **score_yes_no(truth, strict),
                    "num_unknown": num_unknown,
                    "author_rule": score_yes_no(truth, author),
                }
        return scores

    def outcomes(self, answers: Mapping[str, str]) -> dict[str, Outcomes]:
        """Accuracy by the strict rule, per type and question."""
        result: dict[str, Outcomes] = {}
        for kind in TYPES:
            truth = self._truth(kind)
            right = {key: int(key in answers and parse_strict(answers[key]) is label) for key, label in truth.items()}
            if truth:
                result[f"hal_eval_{kind}_accuracy"] = {key: (event, 1) for key, event in right.items()}
        return result

    def _truth(self, kind: str) -> dict[str, bool]:
        items = [item for item, kinds in self._items.items() if kind in kinds]
        return {f"{item}/{TRUE_CAPTION}": True for item in items} | {f"{item}/{kind}": False for item in items}

    def _read(self, row: Mapping[str, Any], place: str) -> tuple[str, list[tuple[str, str]]]:
        image = row.get("image") or row.get("image_path")
        if not image or not row.get("caption") or not isinstance(row.get("hal_caption"), list):
            raise EvaluationError(
                f"{place}: needs image (or image_path), caption and a list hal_caption, got the keys"
                f" {', '.join(sorted(map(str, row)))}."
            )
        captions = [(TRUE_CAPTION, str(row["caption"]).strip())]
        for entry in row["hal_caption"]:
            kind = TYPE_NAMES.get(str(entry.get("type", "")).strip().lower())
            if kind is None:
                raise EvaluationError(
                    f"{place}: unknown hallucination type {entry.get('type')!r}; known: {', '.join(TYPE_NAMES)}."
                )
            if any(kind == other for other, _ in captions):
                raise EvaluationError(f"{place}: has two captions of type {kind!r}.")
            text = str(entry.get("caption") or "").strip()
            if text:
                captions.append((kind, text))
            else:
                self.num_empty_captions += 1
        return str(image), captions
