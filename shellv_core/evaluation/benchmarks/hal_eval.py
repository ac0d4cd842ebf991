"""Hal-Eval. Discriminative: does this caption match the image? Generative: is what the model tells of it true?

Files are the authors': a JSON array (or JSON Lines) of ``{"image" or "image_path", "key"?, "caption", "hal_caption":
[{"type": "Objective Hallucination", "caption": ...}, ...]}``. Each item asks about its true caption and about one
hallucinated caption of each type.

Question ids are ``ITEM/KIND``. ITEM is the item's `key` if it has one, else its image path as written in the file;
the second item with the same name gets ``#2`` behind it, the third ``#3``. KIND is gt, object, attribute, relation or
event.
An answer file holds ``{"question_id": "val2014/COCO_val2014_000000462565.jpg/gt", "text": "yes"}`` rows, in any order,
or the authors' ``{"predict": [five answers], "result": [...]}`` for each item, in the file's order.

In the generative part a judge, the authors' evaluator model or another, reads each description beside its image.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Entry, Outcomes, Question, Scores
from shellv_core.evaluation.rows import check_overlap, index_answers, read_rows
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
        # Kinds in the order of the authors' predict lists, captions that are empty included.
        self._predicted: dict[str, list[str]] = {}
        seen: Counter[str] = Counter()
        for number, row in enumerate(rows, start=1):
            image, captions = self._read(row, f"{source}, item {number}")
            name = str(row.get("key") or image)
            seen[name] += 1
            item = name if seen[name] == 1 else f"{name}#{seen[name]}"
            self._items[item] = [kind for kind, _ in captions]
            self._predicted[item] = [
                TRUE_CAPTION,
                *(TYPE_NAMES[str(entry["type"]).strip().lower()] for entry in row["hal_caption"]),
            ]
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

    def expected(self, question_id: str) -> str:
        """Yes of a true caption, no of the others."""
        return "yes" if question_id.endswith(f"/{TRUE_CAPTION}") else "no"

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

    def read_answers(self, path: Path) -> dict[str, str]:
        """Question id -> text of rows with ids, or of the authors' predict lists."""
        rows = read_rows(path)
        if not any("predict" in row for row in rows):
            return index_answers(rows, str(path))
        if len(rows) != len(self._items):
            raise EvaluationError(
                f"{path} holds {len(rows)} predict lists for {len(self._items)} items. They name no item, so that there"
                " must be one for each item of the question file, in its order."
            )
        answers = {}
        for number, (row, (item, kinds)) in enumerate(zip(rows, self._predicted.items(), strict=True), start=1):
            said = row.get("predict")
            if not isinstance(said, list) or len(said) != len(kinds) or not all(isinstance(text, str) for text in said):
                raise EvaluationError(
                    f"{path}, row {number}: needs a list predict of {len(kinds)} texts ({', '.join(kinds)}), got"
                    f" {said!r}."
                )
            asked = set(self._items[item])
            answers.update({f"{item}/{kind}": text for kind, text in zip(kinds, said, strict=True) if kind in asked})
        return answers

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


HALLUCINATED, KINDS = "hallucinated", "types"
DESCRIBE = "Describe this image."
# What the authors' evaluator model was trained to answer.
_HALLUCINATED_PROMPT = (
    "Caption: {caption}\nQuestion: Based on the image, whether there is any hallucinatory content in the caption?"
)
_KINDS_PROMPT = (
    "{asked}\n{said}\nWhich types of hallucination does the caption have? Name those that it has: object, attribute,"
    " relation, additional (an invented event)."
)
_STEMS: dict[str, tuple[str, ...]] = {
    "object": ("object",),
    "relation": ("relation",),
    "attribute": ("attribut",),
    "event": ("additional", "aditional"),
}


class HalEvalGenerative:
    """Descriptions of images, which a judge reads beside the image; each image is a question of that name.

    Judgments have the ids ``IMAGE/hallucinated`` and, where that is a yes, ``IMAGE/types``.

    Args:
        images: names, each once.
        prompt: what the model is asked.
    """

    key: tuple[str, ...] = ("hal_eval_generative",)
    max_new_tokens = 256

    def __init__(self, images: Iterable[str], prompt: str = DESCRIBE) -> None:
        self._questions = tuple(Question(image, image, prompt) for image in dict.fromkeys(images))
        if not self._questions:
            raise EvaluationError("there are no images to describe.")

    @property
    def questions(self) -> Sequence[Question]:
        """One for each image."""
        return self._questions

    def judge_questions(self, answers: Mapping[str, str], judgments: Mapping[str, str]) -> Sequence[Question]:
        """First whether a description hallucinates; of which types, once the judge has said that it does."""
        asked = []
        for question in self._questions:
            image = question.image
            if image not in answers:
                continue
            first = _HALLUCINATED_PROMPT.replace("{caption}", answers[image])
            asked.append(Question(f"{image}/{HALLUCINATED}", image, first))
            said = judgments.get(f"{image}/{HALLUCINATED}")
            if said is not None and (parse_strict(said) or _first_of(said)):
                prompt = _KINDS_PROMPT.replace("{asked}", first).replace("{said}", said)
                asked.append(Question(f"{image}/{KINDS}", image, prompt))
        return asked

    def expected(self, question_id: str) -> str:
        """Nothing: only the judge tells."""
        return ""

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Scores of the judgments.

        Returns:
            accuracy (descriptions without hallucination / descriptions judged), hallucination_rate, for each type its
            share of the hallucinated descriptions, and counts; under `author_rule` the same where a judgment that says
            neither Yes nor No is a No.
        """
        num_unknown = check_overlap(
            (f"{question.image}/{part}" for question in self._questions for part in (HALLUCINATED, KINDS)), answers
        )
        verdicts = {
            question.image: answers[f"{question.image}/{HALLUCINATED}"]
            for question in self._questions
            if f"{question.image}/{HALLUCINATED}" in answers
        }
        strict = {image: parse_strict(said) for image, said in verdicts.items()}
        author = {image: _first_of(said) for image, said in verdicts.items()}
        parsed: dict[str, bool] = {image: label for image, label in strict.items() if label is not None}
        return {
            **self._rates(parsed, answers),
            "num_images": len(self._questions),
            "num_unjudged": len(self._questions) - len(verdicts),
            "num_unparsed": len(verdicts) - len(parsed),
            "num_unknown": num_unknown,
            "author_rule": self._rates(author, answers),
        }

    def outcomes(self, answers: Mapping[str, str]) -> dict[str, Outcomes]:
        """Accuracy of the descriptions whose judgment can be read."""
        verdicts = {
            each.image: parse_strict(answers.get(f"{each.image}/{HALLUCINATED}", "")) for each in self._questions
        }
        return {
            "hal_eval_generative_accuracy": {
                image: (int(not label), 1) for image, label in verdicts.items() if label is not None
            }
        }

    def _rates(self, verdicts: Mapping[str, bool], answers: Mapping[str, str]) -> Scores:
        hallucinated = [image for image, label in verdicts.items() if label]
        told = [answers[f"{image}/{KINDS}"].lower() for image in hallucinated if f"{image}/{KINDS}" in answers]
        counts = {kind: sum(any(stem in text for stem in stems) for text in told) for kind, stems in _STEMS.items()}
        rate = len(hallucinated) / len(verdicts) if verdicts else 0.0
        return {
            "accuracy": 1 - rate if verdicts else 0.0,
            "hallucination_rate": rate,
            "type_shares": {kind: count / len(hallucinated) if hallucinated else 0.0 for kind, count in counts.items()},
            "num_judged": len(verdicts),
            "num_hallucinated": len(hallucinated),
            "num_by_type": counts,
            "num_without_types": len(hallucinated) - len(told),
        }

    def read_answers(self, path: Path) -> dict[str, str]:
        """Judgments by id, of rows with ids or of the authors' result file."""
        rows = read_rows(path)
        if not any("first_answer" in row for row in rows):
            return index_answers(rows, str(path))
        judgments: dict[str, str] = {}
        for number, row in enumerate(rows, start=1):
            image, first, second = row.get("image"), row.get("first_answer"), row.get("second_answer")
            if not isinstance(image, str) or not isinstance(first, str):
                raise EvaluationError(f"{path}, row {number}: needs texts image and first_answer, got {row!r}.")
            if f"{image}/{HALLUCINATED}" in judgments:
                raise EvaluationError(f"{path}, row {number}: image {image!r} is judged twice; keep one row of it.")
            judgments[f"{image}/{HALLUCINATED}"] = first
            if isinstance(second, str):
                judgments[f"{image}/{KINDS}"] = second
        return judgments


def _first_of(said: str) -> bool:
    """The authors' rule: yes where Yes stands before any No; all else is no."""
    yes, no = said.find("Yes"), said.find("No")
    return yes >= 0 and (no < 0 or yes < no)


def _open_generative(questions: Path) -> HalEvalGenerative:
    rows = read_rows(questions)
    for number, row in enumerate(rows, start=1):
        if not (row.get("image") or row.get("image_path")):
            raise EvaluationError(f"{questions}, row {number}: has no image (or image_path).")
    return HalEvalGenerative(str(row.get("image") or row["image_path"]) for row in rows)


ENTRIES = (
    Entry(
        name="hal-eval",
        summary="Hal-Eval: does a caption match the image, by hallucination type (discriminative)",
        questions="in_domain_evaluation.json or out_of_domain_evaluation.json",
        answers="rows with ITEM/KIND (key or image, #2 for a second such item; gt or type), or predict lists in order\n"
        '{"question_id": "val2014/COCO_val2014_000000462565.jpg/gt", "text": "yes"} or {"predict": ["yes", "no", "no",'
        ' "no", "no"], "result": [1, 0, 0, 0, 0]}',
        published="https://github.com/WisdomShell/hal-eval, evaluation_dataset",
        metrics="per type accuracy, precision, recall, F1, yes ratio; yes is positive",
        rules="authors: substrings no, then yes or match, before the first comma; strict: words, unparsed",
        open=lambda questions: HalEval(read_rows(questions), source=str(questions)),
        read=lambda benchmark, path: benchmark.read_answers(path),
    ),
    Entry(
        name="hal-eval-generative",
        summary="Hal-Eval generative: descriptions that a judge has read beside the image",
        questions="a Hal-Eval file, or the authors' selection: items with image (or image_path)",
        answers="judgments: the authors' rows, or rows with IMAGE/hallucinated and IMAGE/types, and text\n"
        '{"image": "1.jpg", "predict": "A dog.", "first_answer": "Yes", "second_answer":'
        ' "object"} or {"question_id": "1.jpg/hallucinated", "text": "No"}',
        published="https://github.com/WisdomShell/hal-eval, evaluation_dataset",
        metrics="accuracy (descriptions without hallucination), share of each type among the hallucinated",
        rules="authors: a judgment that says neither is a No; strict: unparsed",
        open=_open_generative,
        read=lambda benchmark, path: benchmark.read_answers(path),
    ),
)
