"""A parsed caption as the rules see it: words, names of things, and who does what."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from shellv_core.data.hallucination.captions import Caption
from shellv_core.data.hallucination.lexicon import (
    FIXED_PHRASES,
    NO_OBJECTS,
    NO_PLACES,
    QUANTITIES,
    load_lexicon,
    word_set,
)
from shellv_core.data.objects import find_mentions

PRONOUNS = word_set(
    "he she it they him her them his hers its their theirs himself herself itself themselves each another both"
)
_INSIDE_NOUN_PHRASE = frozenset({"det", "amod", "compound", "nummod", "poss", "predet", "nmod", "quantmod"})


@dataclass(frozen=True)
class Unit:
    """A noun with its compounds, such as "fire hydrant"; `start` and `end` count tokens, `end` is exclusive."""

    start: int
    end: int
    phrase: str  # lower case, as written
    lemma: str  # with the head in the singular
    kind: str
    plural: bool

    @property
    def head(self) -> int:
        """Index of the head token."""
        return self.end - 1


class ParsedCaption:
    """A caption with its parse. Offsets are those of `text`, the caption without spaces around it."""

    def __init__(self, caption: Caption, doc: Any, others: tuple[ParsedCaption, ...] = ()) -> None:
        self.caption = caption
        self.others = others
        self.doc = doc
        self.text = caption.text.strip()
        self.tokens: list[Any] = list(doc)
        self.words: list[str] = [token.lower_ for token in self.tokens]

    @cached_property
    def units(self) -> list[Unit]:
        """The things that the caption names, in order."""
        lexicon = load_lexicon()
        found = []
        for token in self.tokens:
            if token.tag_ not in ("NN", "NNS") or token.dep_ == "compound":
                continue
            start = token.i
            while start > 0 and self.doc[start - 1].dep_ == "compound" and self.doc[start - 1].head.i <= token.i:
                start -= 1
            if start > 0 and (self.words[start - 1], self.words[start]) in FIXED_PHRASES:
                start -= 1
            words = self.words[start : token.i + 1]
            if not all(word.isalpha() for word in words):
                continue
            lemma = " ".join([*words[:-1], token.lemma_.lower()])
            kind = lexicon.kind(lemma)
            if kind:
                plural = token.tag_ == "NNS" or (words[-1] in ("people", "sheep") and self._article(start) == "")
                found.append(Unit(start, token.i + 1, " ".join(words), lemma, kind, plural))
        return found

    def _article(self, index: int) -> str:
        return self.words[index - 1] if index and self.words[index - 1] in ("a", "an") else ""

    @cached_property
    def other_nouns(self) -> list[Unit]:
        """Nouns of no known kind that still name things."""
        known = {unit.head for unit in self.units}
        return [
            Unit(token.i, token.i + 1, token.lower_, token.lemma_.lower(), "", token.tag_ == "NNS")
            for token in self.tokens
            if token.tag_ in ("NN", "NNS")
            and token.i not in known
            and token.dep_ not in ("compound", "npadvmod", "nmod", "amod")
            and token.is_alpha
            and token.lemma_.lower() not in NO_OBJECTS | NO_PLACES
        ]

    @cached_property
    def lemmas(self) -> frozenset[str]:
        """Lemmas of all nouns and names of things in the caption, in the image's other captions and known objects."""
        known = {token.lemma_.lower() for token in self.tokens if token.pos_ in ("NOUN", "PROPN")}
        known.update(unit.lemma for unit in self.units)
        known.update(lemma for other in self.others for lemma in other.lemmas)
        known.update(item.category for item in self.caption.objects)
        return frozenset(known)

    @cached_property
    def known_categories(self) -> frozenset[str]:
        """COCO classes that are in the image by the captions or the known objects."""
        texts = (self.text, *self.caption.other_captions)
        mentioned = {mention.category for text in texts for mention in find_mentions(text)}
        return frozenset(mentioned | {item.category for item in self.caption.objects})

    @cached_property
    def other_words(self) -> frozenset[str]:
        """Words of the image's other captions, in lower case."""
        return frozenset(word.strip(".,") for text in self.caption.other_captions for word in text.lower().split())

    @cached_property
    def pronouns(self) -> frozenset[str]:
        """Pronouns in the caption."""
        return PRONOUNS & frozenset(self.words)

    def unit_at(self, head: int) -> Unit | None:
        """The thing whose head is token `head`."""
        return next((unit for unit in self.units if unit.head == head), None)

    def subject_unit(self, token: Any) -> Unit | None:
        """The thing that token names, or what it is a group of."""
        if token.lemma_.lower() in QUANTITIES:
            for child in token.children:
                if child.lower_ == "of":
                    return next((self.unit_at(item.i) for item in child.children if item.dep_ == "pobj"), None)
        return self.unit_at(token.i)

    def subject_kind(self, token: Any) -> str:
        """The kind of what `token` names or is a group of, or ""."""
        unit = self.subject_unit(token)
        return unit.kind if unit else ""

    def left(self, index: int) -> str:
        """The word before token `index`, "^" at the start. Articles count as one word, as they follow what comes."""
        word = self.words[index - 1] if index > 0 else "^"
        return "a" if word == "an" else word

    def right(self, index: int) -> str:
        """The word at token `index`, "$" at the end."""
        word = self.words[index] if index < len(self.words) else "$"
        return "a" if word == "an" else word

    def span(self, start: int, end: int) -> tuple[int, int]:
        """Character offsets of the tokens `start` to `end` (exclusive)."""
        last = self.doc[end - 1]
        return self.doc[start].idx, last.idx + len(last)

    def noun_phrase_start(self, unit: Unit) -> int:
        """First token of the noun phrase that `unit` heads: its article, number and adjectives included."""
        start = unit.start
        while start > 0:
            token = self.doc[start - 1]
            if token.dep_ not in _INSIDE_NOUN_PHRASE or not unit.start <= token.head.i <= unit.head:
                break
            start -= 1
        return start

    @cached_property
    def verbs(self) -> list[Any]:
        """Full verbs that say what something does."""
        tags = ("VBG", "VBZ", "VBP", "VBN")
        return [token for token in self.tokens if token.tag_ in tags and token.pos_ == "VERB" and token.dep_ != "amod"]

    @cached_property
    def verb_lemmas(self) -> frozenset[str]:
        """Lemmas of `verbs`."""
        return frozenset(lemma_of(verb) for verb in self.verbs)

    def subject(self, verb: Any) -> Any:
        """The token that does or undergoes `verb`, or None."""
        for child in verb.children:
            if child.dep_ in ("nsubj", "nsubjpass") and child.tag_ in ("NN", "NNS"):
                return child
        if verb.dep_ == "acl" and verb.head.tag_ in ("NN", "NNS"):
            return verb.head
        if verb.dep_ == "relcl" and verb.head.tag_ in ("NN", "NNS"):
            return verb.head
        return None


def lemma_of(verb: Any) -> str:
    """The verb's lemma, mended where the parser is known to err."""
    return {"rid": "ride", "lay": "lie", "seat": "sit", "grazing": "graze"}.get(
        verb.lemma_.lower(), verb.lemma_.lower()
    )
