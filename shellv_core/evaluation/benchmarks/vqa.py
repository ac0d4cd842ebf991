"""Open questions with short answers: TextVQA, VQAv2, VizWiz (ten people's answers each) and GQA (one answer).

An answer's score is what ten leave-one-out subsets of the people give it on average, min(1, agreeing people / 3), after
the normalisation of the benchmark's own scorer. Files are the authors' question and annotation files.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Entry, Option, Outcomes, Question, Scores
from shellv_core.evaluation.rows import (
    check_overlap,
    index_answers,
    index_texts,
    read_document,
    read_rows,
    require_fields,
    row_id,
)

SHORT_SUFFIX = "\nAnswer the question using a single word or phrase."
UNANSWERABLE_SUFFIX = "\nWhen the provided information is insufficient, respond with 'Unanswerable'." + SHORT_SUFFIX
_AGREEING = 3
# What a leave-one-out mean of ten thirds is a multiple of.
_TRIALS = 30

_COUNTED = "zero one two three four five six seven eight nine ten"
_NUMBERS = {word: str(value) for value, word in enumerate(_COUNTED.split())} | {"none": "0"}
_ARTICLES = frozenset({"a", "an", "the"})
_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
# Written with a malformed look-behind, so that a digit before the period does not save it.
_PERIOD = re.compile(r"\.(?!\d)")
# The authors hand a flag where a count belongs.
_MAX_PERIODS = 32
# Words that get their apostrophe, with one and with two; and some that the authors' list treats oddly.
_SHORT = (
    "ain't aren't can't could've couldn't didn't doesn't don't hadn't hasn't haven't he'd he's how'd how'll how's isn't"
    " it'd it'll ma'am mightn't might've mustn't must've needn't not've o'clock oughtn't shan't should've shouldn't"
    " somebody'll somebody's someone'd someone'll someone's something'd something'll that's there'd there're there's"
    " they'd they'll they're they've 'twas wasn't we've weren't what'll what're what's what've when's where'd where's"
    " where've who'd who'll who's who've why'll why're why's won't would've wouldn't y'all you'd you'll you're you've"
)
_DOUBLE = (
    "couldn't've hadn't've he'd've it'd've mightn't've she'd've shouldn't've somebody'd've someone'd've something'd've"
    " there'd've they'd've we'd've who'd've wouldn't've y'all'll y'all'd've you'd've"
)
_ODD = {
    "y'alld've": "y'all'd've",
    "somebody'd": "somebodyd",
    "ow's'at": "'ow's'at",
    "'ows'at": "'ow's'at",
    "'ow'sat": "'ow's'at",
}
_CONTRACTIONS = (
    {word.replace("'", ""): word for word in _SHORT.split()}
    | {word.replace("'", "", 1): word for word in _DOUBLE.split()}
    | {"".join(word.rsplit("'", 1)): word for word in _DOUBLE.split()}
    | _ODD
)


def strip_punctuation(text: str) -> str:
    """Punctuation dropped where it touches a space, or where a number has a comma; else a space in its place."""
    result = text
    for mark in _PUNCTUATION:
        dropped = f"{mark} " in text or f" {mark}" in text or _COMMA_IN_NUMBER.search(text) is not None
        result = result.replace(mark, "" if dropped else " ")
    return _PERIOD.sub("", result, count=_MAX_PERIODS)


def plain_words(text: str) -> str:
    """Lower case, numbers to ten as digits, no articles, apostrophes in contractions."""
    words = [_NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def normalize_evalai(text: str) -> str:
    """An answer as EvalAI's processor leaves it (TextVQA, and what LLaVA uploads for VQAv2 and VizWiz)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return plain_words(strip_punctuation(text.replace("\n", " ").replace("\t", " ").strip()))


def score_evalai(said: str, people: Sequence[str]) -> float:
    """TextVQA's soft score: everything is normalised."""
    return _soft_score(normalize_evalai(said), [normalize_evalai(answer) for answer in people])


def score_vqa(said: str, people: Sequence[str]) -> float:
    """VQA's soft score: normalised only where people disagree, and compared in lower case."""
    said, *people = (text.replace("\n", " ").replace("\t", " ").strip() for text in (said, *people))
    if len(set(people)) > 1:
        said, *people = (plain_words(strip_punctuation(text)) for text in (said, *people))
    return _soft_score(said.lower(), [answer.lower() for answer in people])


def score_gqa(said: str, people: Sequence[str]) -> float:
    """GQA's score: the very answer, after LLaVA's conversion (no period at the end, lower case)."""
    return float(normalize_gqa(said) == people[0])


def normalize_gqa(text: str) -> str:
    """An answer as LLaVA uploads it for GQA."""
    return text.rstrip(".").lower()


def _soft_score(said: str, people: Sequence[str]) -> float:
    agreeing = sum(answer == said for answer in people)
    # Leaving out one that agrees, or one of the others.
    parts = agreeing * min(1.0, (agreeing - 1) / _AGREEING) + (len(people) - agreeing) * min(1.0, agreeing / _AGREEING)
    return parts / len(people)


@dataclass(frozen=True)
class Item:
    """One question with people's answers, which are empty where the test server has them, and the groups it is in."""

    image: str
    question: str
    people: tuple[str, ...] = ()
    groups: tuple[str, ...] = ()


class ShortAnswers:
    """A benchmark of short answers.

    Args:
        name: its name, which is also the key of its scores.
        items: question id -> item.
        score_answer: score of a text among people's answers, 0 to 1.
        suffix: what stands behind every question.

    Raises:
        EvaluationError: if there are no questions.
    """

    max_new_tokens = 16

    def __init__(
        self,
        name: str,
        items: Mapping[str, Item],
        score_answer: Callable[[str, Sequence[str]], float],
        suffix: str = SHORT_SUFFIX,
    ) -> None:
        if not items:
            raise EvaluationError(f"the {name} file holds no questions.")
        self.key: tuple[str, ...] = (name,)
        self.items = dict(items)
        self._score_answer = score_answer
        self._questions = tuple(Question(key, item.image, item.question + suffix) for key, item in items.items())

    @property
    def questions(self) -> Sequence[Question]:
        """All questions, in file order."""
        return self._questions

    def expected(self, question_id: str) -> str:
        """People's answers, the most frequent first."""
        return ", ".join(answer for answer, _ in Counter(self.items[question_id].people).most_common())

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Mean score over all questions with people's answers, and by group; a missing answer scores 0.

        `author_rule` has the accuracy over what was answered, as the authors' scorers take it.
        """
        num_unknown = check_overlap(self.items, answers)
        scores = self._scores(answers)
        answered = [score for key, score in scores.items() if key in answers]
        groups: dict[str, list[float]] = {}
        for key, score in scores.items():
            for group in self.items[key].groups:
                groups.setdefault(group, []).append(score)
        result: Scores = {
            "num_questions": len(self.items),
            "num_scored": len(scores),
            "num_missing": sum(key not in answers for key in self.items),
            "num_empty": sum(not answers[key].strip() for key in self.items if key in answers),
            "num_unknown": num_unknown,
        }
        if scores:
            result = {
                "accuracy": sum(scores.values()) / len(scores),
                "by_group": {group: sum(values) / len(values) for group, values in sorted(groups.items())},
                **result,
                "author_rule": {"accuracy": sum(answered) / len(answered) if answered else 0.0},
            }
        return result

    def outcomes(self, answers: Mapping[str, str]) -> dict[str, Outcomes]:
        """Accuracy in thirtieths, per question; of GQA right or wrong."""
        trials = 1 if self._score_answer is score_gqa else _TRIALS
        return {
            f"{self.key[0]}_accuracy": {
                key: (round(trials * score), trials) for key, score in self._scores(answers).items()
            }
        }

    def read_textvqa(self, path: Path) -> dict[str, str]:
        """Answers by question id, of rows with it or of LLaVA's, whose question_id is the image and whose prompt holds
        the question."""
        rows = read_rows(path)
        source = str(path)
        by_question = {(item.image, item.question.lower()): key for key, item in self.items.items()}
        named = []
        for number, row in enumerate(rows, start=1):
            key = row_id(row, number, source)
            if key not in self.items and isinstance(row.get("prompt"), str):
                lines = [line.strip().lower() for line in re.split(r"\n|Question: | Short answer:", row["prompt"])]
                key = next((by_question[key, line] for line in lines if (key, line) in by_question), key)
            named.append((key, row))
        return index_texts(named, source)

    def read_vizwiz(self, path: Path) -> dict[str, str]:
        """Answers by image, of rows with ids or of the upload format."""
        rows = read_rows(path)
        if all("image" in row and "answer" in row for row in rows):
            return index_texts(((str(row["image"]), row) for row in rows), str(path))
        return index_answers(rows, str(path))

    def _scores(self, answers: Mapping[str, str]) -> dict[str, float]:
        return {
            key: self._score_answer(answers[key], item.people) if key in answers else 0.0
            for key, item in self.items.items()
            if item.people
        }


def _list_in(document: Any, path: Path, field: str, kind: str) -> list[dict[str, Any]]:
    if not isinstance(document, dict) or not isinstance(document.get(field), list):
        raise EvaluationError(f"{path}: needs an object with a list {field}; is it {kind}?")
    return list(document[field])


def _people(row: Mapping[str, Any]) -> tuple[str, ...]:
    return tuple(str(each["answer"] if isinstance(each, dict) else each) for each in row.get("answers", ()))


def _open_textvqa(questions: Path) -> ShortAnswers:
    items = {}
    for number, row in enumerate(
        _list_in(read_document(questions), questions, "data", "TextVQA_0.5.1_val.json"), start=1
    ):
        require_fields(row, ("question_id", "image_id", "question"), f"{questions}, row {number}", "a TextVQA question")
        items[str(row["question_id"])] = Item(str(row["image_id"]), str(row["question"]), _people(row))
    return ShortAnswers("textvqa", items, score_evalai)


def _open_vqav2(questions: Path, annotations: Path | None = None) -> ShortAnswers:
    told: dict[str, Mapping[str, Any]] = {}
    if annotations is not None:
        rows = _list_in(read_document(annotations), annotations, "annotations", "v2_mscoco_val2014_annotations.json")
        told = {str(row["question_id"]): row for row in rows}
    document = read_document(questions)
    asked = _list_in(document, questions, "questions", "v2_OpenEnded_mscoco_*_questions.json")
    subset = str(document.get("data_subtype", "val2014"))
    items = {}
    for number, row in enumerate(asked, start=1):
        require_fields(row, ("question_id", "image_id", "question"), f"{questions}, row {number}", "a VQAv2 question")
        key = str(row["question_id"])
        annotation = told.get(key, {})
        # The subtype of the development set is test-dev2015, its images are those of test2015.
        image = f"COCO_{subset.replace('test-dev', 'test')}_{int(row['image_id']):012d}.jpg"
        groups = (str(annotation["answer_type"]),) if "answer_type" in annotation else ()
        items[key] = Item(image, str(row["question"]), _people(annotation), groups)
    return ShortAnswers("vqav2", items, score_vqa)


def _open_vizwiz(questions: Path) -> ShortAnswers:
    items = {}
    for number, row in enumerate(read_rows(questions), start=1):
        require_fields(row, ("image", "question"), f"{questions}, row {number}", "a VizWiz question")
        groups = (str(row["answer_type"]),) if "answer_type" in row else ()
        items[str(row["image"])] = Item(str(row["image"]), str(row["question"]), _people(row), groups)
    return ShortAnswers("vizwiz", items, score_vqa, UNANSWERABLE_SUFFIX)


def _open_gqa(questions: Path) -> ShortAnswers:
    document = read_document(questions)
    if not isinstance(document, dict):
        raise EvaluationError(f"{questions}: needs an object of question id -> question, as in GQA's files.")
    items = {}
    for key, row in document.items():
        require_fields(row, ("imageId", "question"), f"{questions}, question {key}", "a GQA question")
        structural = str(row.get("types", {}).get("structural", ""))
        groups = (structural, "open" if structural == "query" else "binary") if structural else ()
        people = (str(row["answer"]),) if "answer" in row else ()
        items[key] = Item(f"{row['imageId']}.jpg", str(row["question"]), people, groups)
    return ShortAnswers("gqa", items, score_gqa)


def _upload(
    field: str, text_field: str, normalize: Callable[[str], str], number: bool = False
) -> Callable[[ShortAnswers, Mapping[str, str]], bytes]:
    """The test server's file: every question once, one that was not answered with an empty text."""

    def convert(benchmark: ShortAnswers, answers: Mapping[str, str]) -> bytes:
        rows: Iterable[dict[str, Any]] = (
            {field: int(key) if number else key, text_field: normalize(answers.get(key, ""))} for key in benchmark.items
        )
        return json.dumps(list(rows)).encode()

    return convert


ENTRIES = (
    Entry(
        name="textvqa",
        summary="TextVQA: reading text in images",
        questions="TextVQA_0.5.1_val.json",
        answers="rows with TextVQA's question_id and text, or LLaVA's, whose question_id is the image's\n"
        '{"question_id": "003a8ae2ef43b901", "prompt": "what is the brand of this camera?\\n...", "text": "Dakota"}',
        published="https://textvqa.org/dataset",
        metrics="soft accuracy over ten people's answers",
        rules="authors: over what was answered; here also over all questions",
        open=_open_textvqa,
        read=lambda benchmark, path: benchmark.read_textvqa(path),
    ),
    Entry(
        name="vqav2",
        summary="VQAv2: open questions about COCO images",
        questions="v2_OpenEnded_mscoco_*_questions.json",
        answers="rows with question_id and text or answer; the upload format is one of them\n"
        '{"question_id": 262148000, "text": "down"}',
        published="https://visualqa.org/download.html",
        metrics="soft accuracy over ten people's answers, by answer type; test-dev and test are scored by the server",
        rules="authors: over what was answered; here also over all questions",
        open=_open_vqav2,
        options=(Option("annotations", "v2_mscoco_*_annotations.json; without it nothing is scored, only converted"),),
        upload=_upload("question_id", "answer", normalize_evalai, number=True),
    ),
    Entry(
        name="gqa",
        summary="GQA: compositional questions with one answer",
        questions="testdev_balanced_questions.json or another question file",
        answers="rows with question_id and text, or GQA's own questionId and prediction\n"
        '{"question_id": "201307251", "text": "Left"}',
        published="https://cs.stanford.edu/people/dorarad/gqa/download.html",
        metrics="accuracy, by structural type, binary and open",
        rules="authors: over what was answered; here also over all questions",
        open=_open_gqa,
        upload=_upload("questionId", "prediction", normalize_gqa),
    ),
    Entry(
        name="vizwiz",
        summary="VizWiz: questions that blind people asked, some without an answer",
        questions="val.json or test.json",
        answers="rows with the image's name as question_id and text, or the upload format with image and answer\n"
        '{"question_id": "VizWiz_val_00000000.jpg", "text": "unanswerable"}',
        published="https://vizwiz.org/tasks-and-datasets/vqa",
        metrics="soft accuracy over ten people's answers, by answer type; the test split is scored by the server",
        rules="authors: over what was answered; here also over all questions",
        open=_open_vizwiz,
        read=lambda benchmark, path: benchmark.read_vizwiz(path),
        upload=_upload("image", "answer", normalize_evalai),
    ),
)
