"""CHAIR: how many of the objects that a caption names are not in the image.

A scenes file holds ``{"image": "....jpg", "objects": ["dog", ...], "captions": ["A dog ...", ...]}`` rows; objects are
COCO class names. What is there is the union of the objects and of those that the true captions mention. COCO's own
annotation files are read into such rows by `read_coco`.

Objects are found with this project's own words. With the authors' synonyms.txt they are also found as in their scorer.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from shellv_core.data.objects import COCO_CLASSES, Mention, find_mentions
from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Entry, Option, Outcomes, Question, Scores
from shellv_core.evaluation.rows import check_overlap, read_document, read_text, row_id
from shellv_core.evaluation.words import plurals

DEFAULT_PROMPT = "Describe the image."

# What the authors' scorer reads as one word, and as what.
_PAIRS = (
    "motor bike,motor cycle,air plane,traffic light,street light,traffic signal,stop light,fire hydrant,stop sign,"
    "parking meter,suit case,sports ball,baseball bat,baseball glove,tennis racket,wine glass,hot dog,cell phone,"
    "mobile phone,teddy bear,hair drier,potted plant,laptop computer,home plate,train track"
)
_ANIMALS = "bird,cat,dog,horse,sheep,cow,elephant,bear,zebra,giraffe,animal,cub"
_AUTHORS_PAIRS = (
    {pair: pair for pair in _PAIRS.split(",")}
    | {f"{age} {animal}": animal for age in ("baby", "adult") for animal in _ANIMALS.split(",")}
    | {"passenger jet": "jet", "passenger train": "train", "bow tie": "tie", "toilet seat": "toilet"}
)
_WORD = re.compile(r"[a-z]+")


class AuthorsWords:
    """Objects in a text as the authors' scorer finds them: singular words, pairs of words, and their synonyms.

    Args:
        content: their synonyms.txt: a class and its synonyms on each line.
        source: names the file in errors.

    Raises:
        EvaluationError: if a line begins with no class of COCO.
    """

    def __init__(self, content: str, source: str = "synonyms") -> None:
        self._classes: dict[str, str] = {}
        for number, line in enumerate(content.split("\n"), start=1):
            words = [word.strip().lower() for word in line.split(",") if word.strip()]
            if words and words[0] not in COCO_CLASSES:
                raise EvaluationError(f"{source}, line {number}: {words[0]!r} is not one of COCO's 80 classes.")
            self._classes.update(dict.fromkeys(words, words[0]) if words else {})
        parts = {part for phrase in (*self._classes, *_AUTHORS_PAIRS) for part in phrase.split()}
        self._singular = {plural: part for part in parts for plural in plurals(part)} | {part: part for part in parts}

    def find(self, text: str) -> list[str]:
        """Classes of all mentions, in order."""
        words = [self._singular.get(word, word) for word in _WORD.findall(text.lower())]
        merged = []
        position = 0
        while position < len(words):
            pair = _AUTHORS_PAIRS.get(" ".join(words[position : position + 2]))
            merged.append(pair or words[position])
            position += 2 if pair else 1
        if "toilet" in merged:
            merged = [word for word in merged if word != "seat"]
        return [self._classes[word] for word in merged if word in self._classes]


@dataclass(frozen=True)
class CaptionJudgment:
    """One caption against what is there."""

    mentions: tuple[Mention, ...]
    present: frozenset[str]

    @property
    def hallucinated(self) -> tuple[Mention, ...]:
        """Mentions of classes that are not in the image."""
        return tuple(mention for mention in self.mentions if mention.category not in self.present)

    @property
    def recalled(self) -> frozenset[str]:
        """Classes that are in the image and named."""
        return self.present & {mention.category for mention in self.mentions}


class Chair:
    """Captions of scenes, scored by the objects that they mention; the image name is the question id.

    Raises:
        EvaluationError: if a row lacks a field, names an object outside COCO's classes, or an image comes twice.
    """

    key: tuple[str, ...] = ("chair",)

    def __init__(
        self,
        rows: Iterable[Mapping[str, Any]],
        prompt: str = DEFAULT_PROMPT,
        max_new_tokens: int = 64,
        source: str = "scenes",
        authors_words: AuthorsWords | None = None,
    ) -> None:
        self._authors_words = authors_words
        self._present_to_authors: dict[str, frozenset[str]] = {}
        self.max_new_tokens = max_new_tokens
        self.present: dict[str, frozenset[str]] = {}
        for number, row in enumerate(rows, start=1):
            place = f"{source}, row {number}"
            if not row.get("image") or not isinstance(row.get("objects"), list):
                raise EvaluationError(
                    f"{place}: needs image and a list objects, got the keys {', '.join(sorted(row))}."
                )
            for name in row["objects"]:
                if name not in COCO_CLASSES:
                    from shellv_core.config import nearest

                    raise EvaluationError(
                        f"{place}: {name!r} is not one of COCO's 80 classes; {nearest(str(name), COCO_CLASSES)}"
                    )
            if row["image"] in self.present:
                raise EvaluationError(f"{place}: image {row['image']!r} comes twice.")
            told = {mention.category for caption in row.get("captions", ()) for mention in find_mentions(caption)}
            self.present[str(row["image"])] = frozenset(row["objects"]) | told
            if authors_words is not None:
                told = {name for caption in row.get("captions", ()) for name in authors_words.find(caption)}
                self._present_to_authors[str(row["image"])] = frozenset(row["objects"]) | told
        if not self.present:
            raise EvaluationError(f"{source} holds no scenes.")
        self._questions = tuple(Question(image, image, prompt) for image in self.present)

    @property
    def questions(self) -> Sequence[Question]:
        """One for each scene, in file order."""
        return self._questions

    def judge(self, image: str, caption: str) -> CaptionJudgment:
        """The mentions of one caption against what is in `image`."""
        return CaptionJudgment(tuple(find_mentions(caption)), self.present[image])

    def expected(self, question_id: str) -> str:
        """The objects that are there."""
        return ", ".join(sorted(self.present[question_id]))

    def score(self, answers: Mapping[str, str]) -> Scores:
        """CHAIR over all captions.

        Returns:
            instance_rate (hallucinated mentions / mentions, over the corpus; a class named twice counts twice),
            sentence_rate (captions with a hallucinated mention / captions), recall (classes named / classes there),
            num_without_objects (captions that name none, which no rate punishes) and the counts; with the authors'
            words, under `author_rule` the rates that these give.
        """
        num_unknown = check_overlap(self.present, answers)
        judgments = [self.judge(image, answers[image]) for image in self.present if image in answers]
        mentions = sum(len(judgment.mentions) for judgment in judgments)
        hallucinated = sum(len(judgment.hallucinated) for judgment in judgments)
        sentences = sum(bool(judgment.hallucinated) for judgment in judgments)
        present = sum(len(judgment.present) for judgment in judgments)
        recalled = sum(len(judgment.recalled) for judgment in judgments)
        words = sum(len(answers[image].split()) for image in self.present if image in answers)
        return {
            "instance_rate": hallucinated / mentions if mentions else 0.0,
            "sentence_rate": sentences / len(judgments) if judgments else 0.0,
            "recall": recalled / present if present else 0.0,
            "mean_words": words / len(judgments) if judgments else 0.0,
            "num_captions": len(judgments),
            "num_missing": len(self.present) - len(judgments),
            "num_unknown": num_unknown,
            "num_mentions": mentions,
            "num_hallucinated_mentions": hallucinated,
            "num_hallucinated_captions": sentences,
            "num_without_objects": sum(not judgment.mentions for judgment in judgments),
            **({"author_rule": self._score_as_authors(self._authors_words, answers)} if self._authors_words else {}),
        }

    def _score_as_authors(self, words: AuthorsWords, answers: Mapping[str, str]) -> Scores:
        present = {image: there for image, there in self._present_to_authors.items() if image in answers}
        found = {image: words.find(answers[image]) for image in present}
        wrong = {image: [name for name in names if name not in present[image]] for image, names in found.items()}
        mentions, there = sum(map(len, found.values())), sum(map(len, present.values()))
        recalled = sum(len(present[image] & set(names)) for image, names in found.items())
        return {
            "instance_rate": sum(map(len, wrong.values())) / mentions if mentions else 0.0,
            "sentence_rate": sum(map(bool, wrong.values())) / len(wrong) if wrong else 0.0,
            "recall": recalled / there if there else 0.0,
        }

    def outcomes(self, answers: Mapping[str, str]) -> dict[str, Outcomes]:
        """The rates and recall, per image; a missing caption names nothing."""
        judged = {image: self.judge(image, answers.get(image, "")) for image in self.present}
        return {
            "chair_instance_rate": {
                image: (len(each.hallucinated), len(each.mentions)) for image, each in judged.items()
            },
            "chair_sentence_rate": {
                image: (int(bool(each.hallucinated)), int(image in answers)) for image, each in judged.items()
            },
            "chair_recall": {image: (len(each.recalled), len(each.present)) for image, each in judged.items()},
        }

    def read_answers(self, path: Path) -> dict[str, str]:
        """Image name -> caption of rows that name the image or its COCO id, or of a results file with imgToEval."""
        document = read_document(path)
        if isinstance(document, dict) and isinstance(document.get("imgToEval"), dict):
            rows: list[Any] = list(document["imgToEval"].values())
        else:
            rows = document if isinstance(document, list) else [document]
        by_number = {_number_in(image): image for image in self.present}
        answers: dict[str, str] = {}
        for number, row in enumerate(rows, start=1):
            if not isinstance(row, dict):
                raise EvaluationError(f"{path}, row {number}: {row!r} is not a JSON object.")
            named = row.get("image_id", row.get("image"))
            name = row_id(row, number, str(path)) if named is None else str(named)
            if name not in self.present:
                name = by_number.get(_number_in(name), name)
            caption = next((row[key] for key in ("caption", "text", "answer", "response") if key in row), None)
            if not isinstance(caption, str):
                raise EvaluationError(
                    f"{path}, row {number}: needs a string under 'caption' or 'text', got {caption!r}."
                )
            if name in answers:
                raise EvaluationError(f"{path}, row {number}: {name!r} has two captions; keep one row for each image.")
            answers[name] = caption
        return answers


def read_coco(instances: Mapping[str, Any], captions: Mapping[str, Any] | None, source: str) -> list[dict[str, Any]]:
    """Scenes of COCO's annotation files: the classes of an image's instances, and its captions where there are any.

    Raises:
        EvaluationError: if a list is missing.
    """
    for part, content in (("images", instances), ("annotations", instances), ("categories", instances)):
        if not isinstance(content.get(part), list):
            raise EvaluationError(f"{source}: has no list {part}; take COCO's instances file.")
    names = {category["id"]: category["name"] for category in instances["categories"]}
    objects: dict[int, set[str]] = defaultdict(set)
    for annotation in instances["annotations"]:
        objects[annotation["image_id"]].add(names[annotation["category_id"]])
    told: dict[int, list[str]] = defaultdict(list)
    for annotation in (captions or {}).get("annotations", ()):
        told[annotation["image_id"]].append(annotation["caption"])
    return [
        {"image": image["file_name"], "objects": sorted(objects[image["id"]]), "captions": told[image["id"]]}
        for image in instances["images"]
    ]


def _number_in(image: str) -> int | None:
    """COCO's id in a file name, which its last digits are."""
    match = re.search(r"(\d+)(?:\.\w+)?$", image)
    return int(match.group(1)) if match else None


def _open(questions: Path, captions: Path | None = None, synonyms: Path | None = None) -> Chair:
    document = read_document(questions)
    words = None if synonyms is None else AuthorsWords(read_text(synonyms), str(synonyms))
    if isinstance(document, dict) and "annotations" in document:
        told = None if captions is None else read_document(captions)
        return Chair(read_coco(document, told, str(questions)), source=str(questions), authors_words=words)
    return Chair(document if isinstance(document, list) else [document], source=str(questions), authors_words=words)


ENTRIES = (
    Entry(
        name="chair",
        summary="CHAIR: objects that a caption names and the image does not show, on COCO",
        questions="COCO's instances_val2014.json, or rows of image, objects, captions",
        answers="rows of caption or text with COCO's image_id, image or question_id, or a results file with imgToEval\n"
        '{"image_id": 391895, "caption": "A man rides a bike."}',
        published="https://cocodataset.org/#download, annotations_trainval2014",
        metrics="instance rate (CHAIR_i, of mentions), sentence rate (CHAIR_s), recall",
        rules="this project's words for COCO's classes; with --synonyms also the authors'",
        open=_open,
        read=lambda chair, path: chair.read_answers(path),
        options=(
            Option("captions", "COCO's captions_val2014.json, whose objects are there too"),
            Option("synonyms", "the authors' data/synonyms.txt of https://github.com/LisaAnne/Hallucination"),
        ),
    ),
)
