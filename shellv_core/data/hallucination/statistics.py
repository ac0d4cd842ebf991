"""What a sample of the corpus tells: which words stand beside which, what goes together, and what happens.

Rewrites drawn by these counts look like the corpus, which is what keeps text alone from giving them away.
"""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from shellv_core.data.hallucination.grammar import inflect
from shellv_core.data.hallucination.lexicon import FIXED_ADJECTIVES, STATIVE, load_lexicon
from shellv_core.data.hallucination.parsed import ParsedCaption, lemma_of

_SMOOTHING = 1.5
_MAX_EVENTS = 6000


@dataclass(frozen=True)
class Event:
    """Something that happens in another picture, as a participle phrase such as "walking a dog on a leash"."""

    kind: str  # of who does it
    plural: bool
    phrase: str
    verb: str
    nouns: tuple[str, ...]  # lemmas of the things in the phrase
    subject: str  # lemma of who does it
    sentence: str = ""  # the whole as a clause, such as "a woman is walking a dog on a leash"


@dataclass
class CorpusStatistics:
    """Counts over the sample. Keys of pairs are joined by "|" or, for words side by side, by a space."""

    num_captions: int = 0
    words: Counter[str] = field(default_factory=Counter)
    bigrams: Counter[str] = field(default_factory=Counter)
    units: Counter[str] = field(default_factory=Counter)  # "kind|s or p|phrase|lemma"
    together: Counter[str] = field(default_factory=Counter)  # "lemma|lemma" in one caption, sorted
    lemmas: Counter[str] = field(default_factory=Counter)  # captions that name the thing
    adjectives: Counter[str] = field(default_factory=Counter)
    verbs: Counter[str] = field(default_factory=Counter)  # "tag|lemma|form"
    frames: Counter[str] = field(default_factory=Counter)  # "lemma|what follows|kind of it"
    relations: Counter[str] = field(default_factory=Counter)  # "kind|relation|kind"
    doers: Counter[str] = field(default_factory=Counter)  # "kind|verb lemma"
    governed: Counter[str] = field(default_factory=Counter)  # "verb or preposition|lemma of its object"
    compounds: Counter[str] = field(default_factory=Counter)  # "modifying noun|noun"
    events: list[Event] = field(default_factory=list)
    _frame_totals: Counter[str] = field(default_factory=Counter, compare=False, repr=False)
    _doing: Counter[str] = field(default_factory=Counter, compare=False, repr=False)

    @classmethod
    def of(cls, captions: Iterable[ParsedCaption]) -> CorpusStatistics:
        """Count over parsed captions."""
        statistics = cls()
        for caption in captions:
            statistics._add(caption)
        rare = max(2, statistics.num_captions // 1000)
        statistics.events = [
            event
            for event in statistics.events
            if all(statistics.words[word] >= rare or not word.isalpha() for word in event.sentence.split())
        ]
        statistics.bigrams = Counter({key: count for key, count in statistics.bigrams.items() if count > 1})
        statistics.together = Counter({key: count for key, count in statistics.together.items() if count > 1})
        step = max(1, math.ceil(len(statistics.events) / _MAX_EVENTS))
        statistics.events = sorted(set(statistics.events), key=lambda event: (event.phrase, event.sentence))[::step]
        return statistics

    def _add(self, caption: ParsedCaption) -> None:
        self.num_captions += 1
        words = ["^", *("a" if word == "an" else word for word in caption.words), "$"]
        self.words.update(words)
        self.bigrams.update(map(" ".join, pairwise(words)))
        for unit in caption.units:
            self.units[f"{unit.kind}|{'p' if unit.plural else 's'}|{unit.phrase}|{unit.lemma}"] += 1
        lemmas = sorted({unit.lemma for unit in caption.units})
        self.lemmas.update(lemmas)
        self.together.update(f"{first}|{second}" for first in lemmas for second in lemmas if first < second)
        for token in caption.tokens:
            if token.dep_ in ("amod", "acomp") and token.lower_ not in FIXED_ADJECTIVES:
                self.adjectives[token.lower_] += 1
        for verb in caption.verbs:
            lemma = lemma_of(verb)
            self.verbs[f"{verb.tag_}|{lemma}|{verb.lower_}"] += 1
            follows, kind = frame(caption, verb)
            self.frames[f"{lemma}|{follows}|{kind}"] += 1
            doer = caption.subject(verb)
            kind_of_doer = caption.subject_kind(doer) if doer is not None else ""
            self.doers[f"{kind_of_doer}|{lemma}"] += 1
        for unit in caption.units:
            self.governed[f"{governor(caption, unit)}|{unit.lemma}"] += 1
            if unit.end - unit.start == 2:
                self.compounds["|".join(unit.lemma.split(" "))] += 1
        for first, relation, second in relations(caption):
            self.relations[f"{first.kind}|{relation}|{second.kind}"] += 1
        self.events.extend(events(caption))

    def log_context(self, left: str, first: str, last: str, right: str) -> float:
        """Log-probability of words from `first` to `last` between two neighbours, up to what the words share."""
        total = max(self.words["^"], 1) * 12.0
        before = self.bigrams[f"{left} {first}"] + _SMOOTHING * (self.words[first] + 0.5) / total
        after = self.bigrams[f"{last} {right}"] + _SMOOTHING * (self.words[right] + 0.5) / total
        return math.log(before / (self.words[left] + _SMOOTHING)) + math.log(after / (self.words[last] + _SMOOTHING))

    @property
    def frame_totals(self) -> Counter[str]:
        """How often a verb is followed by an object or by a preposition, of whatever kind: "lemma|what follows"."""
        if not self._frame_totals:
            for key, count in self.frames.items():
                self._frame_totals[key.rsplit("|", 1)[0]] += count
        return self._frame_totals

    def lemmas_of_kind(self, kind: str) -> int:
        """How often something of `kind` does something."""
        if not self._doing:
            for key, count in self.doers.items():
                self._doing[key.split("|")[0]] += count
        return self._doing[kind]

    def log_governed(self, governor: str, lemma: str) -> float:
        """Log-share of `lemma` among all that a verb or preposition stands before, against its overall share."""
        seen = self.governed[f"{governor}|{lemma}"] + 0.2
        return math.log(seen / (self.lemmas[lemma] + 2.0))

    def log_together(self, lemma: str, others: Iterable[str]) -> float:
        """Mean log-lift of `lemma` beside other things, each within [-1.5, 1.5]."""
        lifts = []
        for other in others:
            expected = self.lemmas[lemma] * self.lemmas[other] / max(self.num_captions, 1)
            seen = self.together["|".join(sorted((lemma, other)))]
            lifts.append(max(-1.5, min(1.5, math.log((seen + 1.0) / (expected + 1.0)))))
        return sum(lifts) / len(lifts) if lifts else 0.0

    def to_record(self) -> dict[str, Any]:
        """A JSON-serialisable form."""
        record: dict[str, Any] = {"num_captions": self.num_captions}
        for name in _COUNTERS:
            record[name] = dict(sorted(getattr(self, name).items()))
        record["events"] = [
            [item.kind, item.plural, item.phrase, item.verb, list(item.nouns), item.subject, item.sentence]
            for item in self.events
        ]
        return record

    @classmethod
    def from_record(cls, record: dict[str, Any]) -> CorpusStatistics:
        """The inverse of `to_record`."""
        statistics = cls(num_captions=record["num_captions"])
        for name in _COUNTERS:
            setattr(statistics, name, Counter(record[name]))
        statistics.events = [
            Event(kind, plural, phrase, verb, tuple(nouns), subject, sentence)
            for kind, plural, phrase, verb, nouns, subject, sentence in record["events"]
        ]
        return statistics


_COUNTERS = (
    "words", "bigrams", "units", "together", "lemmas", "adjectives", "verbs", "frames", "relations", "doers",
    "governed", "compounds",
)  # fmt: skip


class Vocabulary:
    """Lists that candidates are drawn from, looked up by kind; derived from the statistics."""

    def __init__(self, statistics: CorpusStatistics) -> None:
        self.units: dict[tuple[str, bool], list[tuple[str, str, int]]] = defaultdict(list)
        for key, count in sorted(statistics.units.items()):
            kind, number, phrase, lemma = key.split("|")
            if count >= 2:
                self.units[kind, number == "p"].append((phrase, lemma, count))
        self.modifiers: dict[str, list[str]] = defaultdict(list)
        for key, count in sorted(statistics.compounds.items()):
            if count >= 2:
                self.modifiers[key.split("|")[1]].append(key.split("|")[0])
        self.verbs: dict[str, list[tuple[str, str, int]]] = defaultdict(list)
        for key, count in sorted(statistics.verbs.items()):
            tag, lemma, form = key.split("|")
            if count >= 2 and load_lexicon().is_verb(lemma) and (lemma not in STATIVE or lemma == "wear"):
                self.verbs[tag].append((lemma, form, count))
        self.events: dict[str, list[Event]] = defaultdict(list)
        for event in statistics.events:
            self.events[event.kind].append(event)


def governor(caption: ParsedCaption, unit: Any) -> str:
    """The verb or preposition that a thing is the object of, "^" for subjects and heads."""
    token = caption.tokens[unit.head]
    while token.dep_ == "conj":
        token = token.head
    if token.dep_ == "pobj":
        return str(token.head.lower_)
    return lemma_of(token.head) if token.dep_ == "dobj" else "^"


def frame(caption: ParsedCaption, verb: Any) -> tuple[str, str]:
    """What follows a verb, "dobj", a preposition or "", and the kind of thing that it is."""
    for child in verb.children:
        if child.dep_ == "dobj" and child.i > verb.i:
            unit = caption.unit_at(child.i)
            return "dobj", unit.kind if unit else ""
    if verb.i + 1 < len(caption.words) and (verb.nbor(1).tag_ in ("IN", "RP") or verb.nbor(1).lower_ == "next"):
        following = verb.nbor(1)
        unit = next((caption.unit_at(child.i) for child in following.children if child.dep_ == "pobj"), None)
        return following.lower_, unit.kind if unit else ""
    return "", ""


def relations(caption: ParsedCaption) -> Iterable[tuple[Any, str, Any]]:
    """(thing, preposition or verb lemma, thing) triples."""
    for unit in caption.units:
        head = caption.tokens[unit.head]
        if head.dep_ == "pobj" and head.head.dep_ == "prep":
            first = head.head.head
            if first.pos_ == "VERB":
                first = caption.subject(first)
            subject = caption.unit_at(first.i) if first is not None else None
            if subject is not None:
                yield subject, head.head.lower_, unit
        elif head.dep_ == "dobj":
            first = caption.subject(head.head)
            subject = caption.unit_at(first.i) if first is not None else None
            if subject is not None:
                yield subject, lemma_of(head.head), unit


@dataclass(frozen=True)
class EventPhrase:
    """Where a caption tells an event: the participle phrase and the caption without it (both of `text`)."""

    subject: Any
    verb: str
    start: int  # tokens of the phrase
    end: int
    phrase: str
    remainder: str
    nouns: tuple[str, ...]


def event_phrases(caption: ParsedCaption) -> list[EventPhrase]:
    """Events of the caption that can be told in a phrase of their own, the one with the most words last."""
    found = []
    for verb in caption.verbs:
        lemma = lemma_of(verb)
        subject = caption.subject(verb)
        if lemma in STATIVE or subject is None or subject.i > verb.i:
            continue
        if caption.subject_unit(subject) is None:
            continue
        start, end = verb.i, len(caption.words)
        while end > start + 1 and caption.tokens[end - 1].is_punct:
            end -= 1
        if any(token.dep_ in ("ROOT", "nsubj", "nsubjpass") for token in caption.tokens[start + 1 : end]):
            continue
        if verb.dep_ == "acl" and verb.tag_ in ("VBG", "VBN"):
            begin = start
        elif verb.dep_ == "ROOT" and verb.tag_ in ("VBG", "VBZ", "VBP", "VBN"):
            begin = next((child.i for child in verb.children if child.dep_ in ("aux", "auxpass")), start)
            if begin != caption.tokens[subject.i].right_edge.i + 1 and begin != start:
                continue
        else:
            continue
        if any(token.dep_ in ("neg", "mark", "advmod") and begin <= token.i < start for token in caption.tokens):
            continue
        words = caption.words[start:end]
        if not 2 <= len(words) <= 14 or any(token.tag_ in ("WDT", "WP") for token in caption.tokens[start:end]):
            continue
        form = verb.lower_ if verb.tag_ in ("VBG", "VBN") else inflect(lemma, "VBG")
        first, last = caption.span(start, end)
        phrase = form + caption.text[first + len(verb) : last]
        before = caption.text[: caption.tokens[begin].idx].rstrip(" ,")
        after = caption.text[last:].strip(" ,")
        joined = before + (after if after in (".", "!", "") else f" {after}")
        nouns = tuple(unit.lemma for unit in caption.units if start <= unit.head < end)
        if before and after in (".", "!", ""):
            found.append(EventPhrase(subject, lemma, begin, end, phrase, joined, nouns))
    return sorted(found, key=lambda item: item.end - item.start)


def events(caption: ParsedCaption) -> list[Event]:
    """The caption's events in a form that other captions can be given."""
    lexicon = load_lexicon()
    found = []
    for item in event_phrases(caption):
        unit = caption.subject_unit(item.subject)
        words = item.phrase.lower().split()
        if unit is None or len(words) > 10 or caption.pronouns & set(words):
            continue
        if not item.nouns or not (words[0].endswith("ing") or words[0] == "parked"):
            continue
        first = item.subject.i
        while first > 0 and caption.tokens[first - 1].head.i in range(first, item.subject.i + 1):
            first -= 1
        start, end = caption.span(first, max(unit.end, item.subject.i + 1))
        verb = "are" if unit.plural else "is"
        subject = caption.text[start:end].lower()
        sentence = f"{subject} {verb} {item.phrase}"
        kind = lexicon.kind(unit.lemma)
        found.append(Event(kind, unit.plural, item.phrase, item.verb, item.nouns, unit.lemma, sentence))
    return found
