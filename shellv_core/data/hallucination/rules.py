"""Rules that give, for one parsed caption, all the lies that the word tables and the corpus suggest.

Every rule proposes; `balance` chooses among the proposals, `filtering` rejects.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import Any

from shellv_core.data.hallucination.config import RewriteType
from shellv_core.data.hallucination.grammar import Edit, apply_edits, inflect
from shellv_core.data.hallucination.lexicon import (
    AMOUNTS,
    ASYMMETRIC,
    COLORS,
    CONTRARY_PREPOSITIONS,
    FIXED_ADJECTIVES,
    FIXED_PHRASES,
    INHERENT,
    INHERENT_RELATIONS,
    INSTEAD_OF_HAVING,
    MANY,
    NO_OBJECTS,
    NO_PLACES,
    NOT_INHERENT,
    NUMBERS,
    PAIRED,
    POSTURES,
    QUANTITIES,
    STATIVE,
    SYMMETRIC,
    WHOLE_RELATIONS,
    gender,
    load_lexicon,
    word_set,
)
from shellv_core.data.hallucination.parsed import ParsedCaption, Unit, lemma_of
from shellv_core.data.hallucination.statistics import (
    CorpusStatistics,
    Event,
    EventPhrase,
    Vocabulary,
    event_phrases,
    events,
    frame,
    governor,
)


@dataclass(frozen=True)
class Candidate:
    """A possible rewrite.

    Attributes:
        text: The lie.
        truth: The true sentence that it stands against.
        original: Changed words of `truth`.
        replacement: Changed words of `text`.
        log_weight: How well it fits its place and the corpus; higher is more likely to be chosen.
        rule: Which rule made it.
    """

    text: str
    truth: str
    original: str
    replacement: str
    log_weight: float
    rule: str


class Rules:
    """The proposals of all four types, given the corpus."""

    def __init__(self, statistics: CorpusStatistics, num_candidates: int, seed: int) -> None:
        self._statistics = statistics
        self._vocabulary = Vocabulary(statistics)
        self._lexicon = load_lexicon()
        self._num_candidates = num_candidates
        self._seed = seed
        self._rules = {
            "object": (self._objects,),
            "attribute": (
                self._adjectives,
                self._compounds,
                self._postures,
                self._states,
                self._cardinals,
                self._renumbered,
                self._amounts,
                self._told_attributes,
            ),
            "relation": (self._prepositions, self._separated, self._possessions, self._verbs, self._exchanges),
            "event": (self._replaced_events, self._second_events, self._onlookers),
        }
        # Truths that hold of anything, where a caption gives nothing to change.
        self._last_resorts = {"attribute": (self._inherent,), "relation": (self._inherent_relations,)}

    def propose(self, caption: ParsedCaption, kind: RewriteType) -> list[Candidate]:
        """Up to `num_candidates` rewrites of type `kind`, the best by weight, in a fixed order."""
        found: dict[tuple[str, str], Candidate] = {}
        for rules in (self._rules[kind], self._last_resorts.get(kind, ())):
            for candidate in (candidate for rule in rules for candidate in rule(caption)):
                known = found.get((candidate.text, candidate.truth))
                if known is None or known.log_weight < candidate.log_weight:
                    found[candidate.text, candidate.truth] = candidate
            if any(candidate.rule not in _ONE_WAY for candidate in found.values()):
                break
        ordered = sorted(found.values(), key=lambda item: (-item.log_weight, item.text))
        return ordered[: self._num_candidates]

    # objects

    def _objects(self, caption: ParsedCaption) -> Iterator[Candidate]:
        for unit in (*caption.units, *caption.other_nouns):
            if not self._replaceable(caption, unit):
                continue
            left, right = caption.left(unit.start), caption.right(unit.end)
            left = "a" if left == "an" else left
            others = [item.lemma for item in caption.units if item != unit]
            for phrase, lemma, count in self._alternatives(unit):
                if not self._is_absent(caption, unit, lemma):
                    continue
                words = phrase.split(" ")
                weight = self._statistics.log_context(left, words[0], words[-1], right)
                weight += math.log(count / (self._statistics.words[words[0]] + 1.0)) if len(words) > 1 else 0.0
                weight += self._statistics.log_governed(governor(caption, unit), lemma)
                weight += 0.7 * self._statistics.log_together(lemma, others)
                weight += 0.8 * self._lexicon.nearness(lemma, unit.lemma)
                if not unit.kind:
                    if not self._statistics.governed[f"{governor(caption, unit)}|{lemma}"]:
                        continue
                    weight -= 3.0
                yield self._edited(caption, [(*caption.span(unit.start, unit.end), phrase)], weight, "co-hyponym")
            if unit.end - unit.start == 2 and unit.kind == "person":
                yield from self._other_sorts(caption, unit, "sort of person")

    def _replaceable(self, caption: ParsedCaption, unit: Unit) -> bool:
        token = caption.tokens[unit.head]
        if token.dep_ in ("npadvmod", "compound", "nmod", "amod") or token.nbor(-1).text == "-" if token.i else False:
            return False
        if unit.end < len(caption.words) and caption.words[unit.end] in ("-", "'s", "'"):
            return False
        return not (unit.kind == "person" and unit.lemma == "person" and "each" in caption.pronouns)

    def _alternatives(self, unit: Unit) -> Iterator[tuple[str, str, int]]:
        kinds = [unit.kind]
        if unit.lemma in ("person", "people", "someone"):
            kinds = ["animal"]
        elif not unit.kind:
            kinds = ["thing", "structure", "vessel", "furniture", "device", "vehicle", "animal", "food", "plant"]
        elif unit.kind in ("vessel", "indoor", "accessory", "paper", "device", "sport", "bedding", "thing"):
            kinds = ["vessel", "indoor", "accessory", "paper", "device", "sport", "thing"]
        seen = set()
        for kind in kinds:
            for item in self._vocabulary.units[kind, unit.plural]:
                seen.add(item[1])
                yield item
        if " " not in unit.lemma:
            for word in list(self._lexicon.siblings(unit.lemma))[:6]:
                if word not in seen and self._lexicon.kind(word):
                    yield inflect(word, "NNS") if unit.plural else word, word, 1

    def _is_absent(self, caption: ParsedCaption, unit: Unit, lemma: str) -> bool:
        """Whether the new thing is not in the image, by all that is known."""
        if self._lexicon.may_be_same(unit.lemma, lemma):
            return False
        last = lemma.rsplit(" ", 1)[-1]
        if last in caption.lemmas or lemma in caption.lemmas or last in caption.other_words:
            return False
        own, category = self._lexicon.category(unit.lemma), self._lexicon.category(lemma)
        if category and category in caption.known_categories and (category != own or own != "person"):
            return False
        sexes = {"m": {"his", "he", "him", "himself"}, "f": {"her", "she", "hers", "herself"}}
        if gender(unit.lemma) and sexes[gender(unit.lemma)] & caption.pronouns:
            return gender(lemma) == gender(unit.lemma)
        return all(not self._lexicon.may_be_same(item.lemma, lemma) for item in caption.units if item != unit)

    # attributes

    def _adjectives(self, caption: ParsedCaption) -> Iterator[Candidate]:
        for token in caption.tokens:
            word = token.lower_
            contrary = self._lexicon.contrary_adjectives(word)
            if not contrary or token.dep_ not in ("amod", "acomp", "compound", "conj", "nmod", "ccomp", "ROOT"):
                continue
            if token.pos_ not in ("ADJ", "VERB", "NOUN", "PROPN") or token.tag_ in ("VBZ", "VBP", "NNS"):
                continue
            following = caption.right(token.i + 1)
            if token.pos_ in ("NOUN", "PROPN") and (token.dep_ != "compound" or following == "of"):
                continue
            if token.tag_ in ("VBN", "VBG") and not self._lexicon.is_listed(word):
                continue
            if any(child.dep_ in ("advmod", "npadvmod") for child in token.children):
                continue
            if (
                word in FIXED_ADJECTIVES
                or (word, following) in FIXED_PHRASES
                or "-"
                in (
                    following,
                    caption.left(token.i),
                )
            ):
                continue
            if word in COLORS and token.dep_ == "conj" and caption.left(token.i) == "and":
                continue
            for other in contrary:
                if other in caption.words or other in caption.other_words or (other, following) in FIXED_PHRASES:
                    continue
                count = self._statistics.adjectives[other]
                weight = self._statistics.log_context(caption.left(token.i), other, other, following)
                weight += 0.0 if count else -3.0
                yield self._edited(caption, [(*caption.span(token.i, token.i + 1), other)], weight, "adjective")

    def _compounds(self, caption: ParsedCaption) -> Iterator[Candidate]:
        """Another sort of the same thing: a tennis court for a basketball court."""
        for unit in caption.units:
            if unit.end - unit.start == 2 and not self._lexicon.category(unit.lemma):
                yield from self._other_sorts(caption, unit, "sort")

    def _other_sorts(self, caption: ParsedCaption, unit: Unit, rule: str) -> Iterator[Candidate]:
        word, noun = unit.lemma.split(" ")
        for other in self._vocabulary.modifiers[noun]:
            if other in caption.words or other in caption.other_words or self._lexicon.may_be_same(word, other):
                continue
            if not self._lexicon.are_alike(word, other):
                continue
            head = unit.phrase.split(" ")[1]
            weight = self._statistics.log_context(caption.left(unit.start), other, other, head)
            yield self._edited(caption, [(*caption.span(unit.start, unit.start + 1), other)], weight, rule)

    def _amounts(self, caption: ParsedCaption) -> Iterator[Candidate]:
        """A couple is told as a crowd, and the reverse."""
        for own, others in (AMOUNTS, AMOUNTS[::-1]):
            for phrase in own:
                words = phrase.split(" ")
                for start in range(len(caption.words) - len(words)):
                    end = start + len(words)
                    if caption.words[start:end] != words or set(caption.words[end : end + 3]) & PAIRED:
                        continue
                    if words == ["two"] or words == ["many"]:
                        continue
                    for other in others:
                        parts = other.split(" ")
                        left, right = caption.left(start), caption.right(end)
                        weight = self._statistics.log_context(left, parts[0], parts[-1], right) - 2.0
                        yield self._edited(caption, [(*caption.span(start, end), other)], weight, "amount")

    def _inherent(self, caption: ParsedCaption) -> Iterator[Candidate]:
        """What is true of a thing by its nature is put before it in the truth, and its contrary in the lie."""
        for unit in caption.units:
            told = next((word for word, nouns in INHERENT.items() if unit.lemma.split(" ")[-1] in nouns.split()), None)
            start = caption.noun_phrase_start(unit)
            if told is None or any(caption.tokens[index].dep_ == "amod" for index in range(start, unit.start)):
                continue
            position = caption.span(unit.start, unit.end)[0]
            truth = apply_edits(caption.text, [(position, position, f"{told} ")])[0]
            for other in NOT_INHERENT[told]:
                text = apply_edits(caption.text, [(position, position, f"{other} ")])[0]
                yield Candidate(text, truth, told, other, -12.0, "inherent")

    def _postures(self, caption: ParsedCaption) -> Iterator[Candidate]:
        for verb in caption.verbs:
            lemma = lemma_of(verb)
            subject = caption.subject(verb)
            unit = caption.subject_unit(subject) if subject is not None else None
            if unit is None or unit.kind not in ("person", "animal"):
                continue
            own = next((group for group in POSTURES if lemma in group.split()), None)
            if own is None or any(child.dep_ == "dobj" for child in verb.children):
                continue
            follows, kind = frame(caption, verb)
            for other, form, count in self._vocabulary.verbs[verb.tag_]:
                if other in own.split() or not any(other in group.split() for group in POSTURES):
                    continue
                weight = self._statistics.log_context(caption.left(verb.i), form, form, caption.right(verb.i + 1))
                seen = self._statistics.frames[f"{other}|{follows}|{kind}"]
                weight += math.log((seen + 0.05) / count)
                weight += self._log_doer(unit.kind, other)
                yield self._edited(caption, [(*caption.span(verb.i, verb.i + 1), form)], weight, "posture")

    def _log_doer(self, kind: str, verb: str) -> float:
        return math.log((self._statistics.doers[f"{kind}|{verb}"] + 0.02) / (self._statistics.lemmas_of_kind(kind) + 1))

    def _cardinals(self, caption: ParsedCaption) -> Iterator[Candidate]:
        for token in caption.tokens:
            if token.lower_ not in NUMBERS or token.dep_ != "nummod" or token.head.tag_ != "NNS":
                continue
            if token.i + 1 >= len(caption.words) or caption.words[token.i + 1] in ("-", "story", "way", "door"):
                continue
            for other in NUMBERS:
                if other != token.lower_ and other not in caption.other_words:
                    following = caption.right(token.i + 1)
                    weight = self._statistics.log_context(caption.left(token.i), other, other, following)
                    yield self._edited(caption, [(*caption.span(token.i, token.i + 1), other)], weight, "number")

    def _renumbered(self, caption: ParsedCaption) -> Iterator[Candidate]:
        """One thing becomes several, several become one, with all words that agree."""
        for unit in caption.units:
            if caption.pronouns and (unit.kind == "person" or unit == caption.units[0]):
                continue
            token = caption.tokens[unit.head]
            governing = governor(caption, unit)
            if governing not in _COUNTED_AFTER or token.dep_ in ("npadvmod", "compound", "attr"):
                continue
            if unit.plural and governing == "of" and token.head.head.lemma_.lower() in QUANTITIES:
                continue
            is_subject = token.dep_ in ("nsubj", "nsubjpass") or token.i == 0
            if any(child.dep_ in (("conj", "cc") if is_subject else ()) for child in token.children):
                continue
            if any(child.dep_ in ("appos", "relcl") for child in token.children):
                continue
            agreement = self._agreement(caption, unit, token)
            if agreement is None:
                continue
            start = caption.noun_phrase_start(unit)
            first = caption.words[start]
            noun_span = caption.span(unit.head, unit.end)
            if not unit.plural and first in ("a", "an") and token.tag_ == "NN":
                form = inflect(unit.lemma, "NNS").split(" ")[-1]
                if form == caption.words[unit.head] or unit.kind in ("drink", "place", "room"):
                    continue
                for number in ("two", "three", "several", "four", "some"):
                    if number in caption.other_words:
                        continue
                    following = caption.right(start + 1) if start + 1 != unit.head else form
                    weight = self._statistics.log_context(caption.left(start), number, number, following)
                    weight += self._statistics.log_context(following, form, form, caption.right(unit.end)) / 2
                    edits = [(*caption.span(start, start + 1), number), (*noun_span, form), *agreement]
                    yield self._edited(caption, edits, weight, "one to several")
            elif unit.plural and (first in NUMBERS or first in MANY or first == "some" or start == unit.start):
                form = "person" if unit.lemma == "people" else unit.lemma.split(" ")[-1]
                if form == caption.words[unit.head] and form != "sheep":
                    continue
                edits = [(*noun_span, form), *agreement]
                if start == unit.start:
                    begin = caption.span(start, start + 1)[0]
                    edits[0] = (begin, noun_span[1], f"a {caption.text[begin : noun_span[0]]}{form}".lower())
                else:
                    edits.append((*caption.span(start, start + 1), "a"))
                weight = self._statistics.log_context(caption.left(start), "a", form, caption.right(unit.end))
                yield self._edited(caption, edits, weight, "several to one")

    def _agreement(self, caption: ParsedCaption, unit: Unit, token: Any) -> list[Edit] | None:
        """Edits that make the verb agree with the other number; None where that cannot be told."""
        verb = token.head if token.dep_ in ("nsubj", "nsubjpass") else None
        if verb is None:
            finite = [item for item in caption.tokens if item.tag_ in ("VBZ", "VBP") and item.i > unit.head]
            return None if any(item.head.i == unit.head or item.dep_ == "ROOT" for item in finite) else []
        finite = [verb, *(child for child in verb.children if child.dep_ in ("aux", "auxpass"))]
        edits = []
        swapped = {"is": "are", "are": "is", "has": "have", "have": "has", "was": "were", "were": "was"}
        for item in finite:
            if item.lower_ in swapped:
                edits.append((*caption.span(item.i, item.i + 1), swapped[item.lower_]))
            elif item.tag_ in ("VBZ", "VBP"):
                form = inflect(lemma_of(item), "VBZ" if unit.plural else "VBP")
                edits.append((*caption.span(item.i, item.i + 1), form))
        conjoined = any(
            item.tag_ in ("VBZ", "VBP") and item.dep_ in ("conj", "advcl", "ccomp", "relcl") for item in caption.tokens
        )
        return None if conjoined else edits

    def _told_attributes(self, caption: ParsedCaption) -> Iterator[Candidate]:
        """A color is put before a thing whose true color is known; the truth is extended by the true one."""
        for unit in caption.units:
            start = caption.noun_phrase_start(unit)
            if any(caption.tokens[index].dep_ == "amod" for index in range(start, unit.start)):
                continue
            told = self._told_color(caption, unit)
            if not told:
                continue
            position = caption.span(unit.start, unit.end)[0]
            truth, _, _ = apply_edits(caption.text, [(position, position, f"{told} ")])
            for other in sorted(self._lexicon.contrary_adjectives(told) & COLORS - caption.other_words):
                weight = self._statistics.log_context(caption.left(unit.start), other, other, unit.phrase.split(" ")[0])
                text, _, _ = apply_edits(caption.text, [(position, position, f"{other} ")])
                yield Candidate(text, truth, told, other, weight, "told color")

    def _told_color(self, caption: ParsedCaption, unit: Unit) -> str:
        category = self._lexicon.category(unit.lemma)
        colors = {item.color for item in caption.caption.objects if category and item.category == category}
        if len(colors) == 1:
            return colors.pop() or ""
        phrase = unit.phrase.split(" ")[0]
        told: set[str] = set()
        for text in caption.caption.other_captions:
            words = text.lower().replace(",", " ").replace(".", " ").split()
            told.update(word for word, after in pairwise(words) if after == phrase and word in COLORS)
        return told.pop() if len(told) == 1 else ""

    # relations

    def _prepositions(self, caption: ParsedCaption) -> Iterator[Candidate]:
        position = 0
        while position < len(caption.words):
            size = self._preposition_at(caption, position)
            if not size:
                position += 1
                continue
            phrase = " ".join(caption.words[position : position + size])
            last = caption.tokens[position + size - 1]
            for other in self._contrary_prepositions(caption, phrase, position, last):
                words = other.split(" ")
                right = caption.right(position + size)
                weight = self._statistics.log_context(caption.left(position), words[0], words[-1], right)
                for before, after in pairwise(words):
                    seen = self._statistics.bigrams[f"{before} {after}"] + 0.5
                    weight += math.log(seen / (self._statistics.words[before] + 5.0))
                place = next((child for child in last.children if child.dep_ == "pobj"), None)
                lemma = place.lemma_.lower() if place is not None else ""
                if phrase == "with" and other != "without" and not self._statistics.governed[f"{words[-1]}|{lemma}"]:
                    continue
                if place is not None and len(words) == 1:
                    weight += 0.5 * self._statistics.log_governed(other, place.lemma_.lower())
                span = caption.span(position, position + size)
                rule = "company" if phrase == "with" else "preposition"
                yield self._edited(caption, [(*span, other)], weight, rule)
            position += size

    def _separated(self, caption: ParsedCaption) -> Iterator[Candidate]:
        """Things that are together or in one another are told apart."""
        for unit in caption.units:
            token = caption.tokens[unit.head]
            start = caption.noun_phrase_start(unit)
            before = caption.words[start - 1] if start else ""
            if before == "and" and token.dep_ == "conj" and token.head.tag_ in ("NN", "NNS"):
                others = ("without", "behind", "on top of") if token.head.dep_ in ("ROOT", "pobj", "dobj") else ()
            elif before == "of" and token.dep_ == "pobj" and unit.kind in ("food", "drink"):
                vessel = caption.unit_at(token.head.head.i)
                others = ("without", "next to", "behind") if vessel is not None and vessel.kind == "vessel" else ()
            else:
                continue
            for other in others:
                words = other.split(" ")
                right = caption.right(start)
                weight = self._statistics.log_context(caption.left(start - 1), words[0], words[-1], right)
                yield self._edited(caption, [(*caption.span(start - 1, start), other)], weight, "separation")

    def _preposition_at(self, caption: ParsedCaption, position: int) -> int:
        for size in range(min(5, len(caption.words) - position), 0, -1):
            if " ".join(caption.words[position : position + size]) in CONTRARY_PREPOSITIONS:
                return size
        return 0

    def _contrary_prepositions(self, caption: ParsedCaption, phrase: str, position: int, last: Any) -> list[str]:
        if phrase in WHOLE_RELATIONS:
            return list(CONTRARY_PREPOSITIONS[phrase])
        if last.tag_ not in ("IN", "RP", "TO") or position == 0:
            return []
        place = next((child for child in last.children if child.dep_ == "pobj"), None)
        if last.tag_ == "RP" or phrase in ("up", "down"):
            verbs = (
                "ride",
                "walk",
                "go",
                "ski",
                "drive",
                "run",
                "fly",
                "come",
                "travel",
                "look",
                "climb",
                "slide",
                "move",
                "jump",
                "ski",
                "skateboard",
            )
            head = last.head
            return list(CONTRARY_PREPOSITIONS[phrase]) if head.pos_ == "VERB" and lemma_of(head) in verbs else []
        if place is None or place.pos_ not in ("NOUN", "PROPN", "PRON"):
            return []
        unit = caption.unit_at(place.i)
        if place.lemma_.lower() in NO_OBJECTS | NO_PLACES and (unit is None or " " not in unit.lemma):
            return []
        kind, lemma = (unit.kind, unit.lemma) if unit else ("", place.lemma_.lower())
        if kind == "clothing":
            return ["without", "next to", "behind"] if phrase in ("in", "with") else []
        first = caption.tokens[position]
        head = first.head
        while head.dep_ in ("prep", "advmod") and head.i >= position:
            head = head.head
        if head.pos_ == "VERB" and lemma_of(head) in ("cover", "fill", "make", "play", "top", "dress", "look"):
            return []
        options = list(CONTRARY_PREPOSITIONS[phrase])
        if phrase in ("in", "inside", "at", "on") and kind in ("place", "room", "building", "plant"):
            allowed = {"outside", "next to", "near", "behind", "beside", "in front of", "outside of", "far from"}
            allowed = allowed if phrase != "on" else {"next to", "near", "beside", "above", "under"}
            options = [item for item in options if item in allowed]
        if phrase == "on" and lemma in ("phone", "cell phone", "cellphone", "tv", "television", "computer", "wall"):
            options = [item for item in options if item in ("next to", "behind", "near")]
        if kind != "vessel":
            options = [item for item in options if (phrase, item) not in (("on", "in"), ("in", "on"))]
        return options

    def _possessions(self, caption: ParsedCaption) -> Iterator[Candidate]:
        """What has a thing is told to be elsewhere."""
        for verb in caption.tokens:
            if verb.lower_ not in _HAVING or verb.pos_ not in ("VERB", "AUX"):
                continue
            had = next((child for child in verb.children if child.dep_ == "dobj"), None)
            if had is None or had.tag_ not in ("NN", "NNS") or had.lemma_.lower() in NO_OBJECTS:
                continue
            copula = _HAVING[verb.lower_]
            for other in INSTEAD_OF_HAVING:
                words = other.split(" ")
                right = caption.right(verb.i + 1)
                weight = self._statistics.log_context(caption.left(verb.i), words[0], words[-1], right) - 2.0
                yield self._edited(caption, [(*caption.span(verb.i, verb.i + 1), copula + other)], weight, "possession")

    def _inherent_relations(self, caption: ParsedCaption) -> Iterator[Candidate]:
        """Where the ground or the sky is, said rightly and wrongly."""
        if not caption.units and not caption.other_nouns:
            return
        for told, other in INHERENT_RELATIONS:
            truth, lie = (_appended(caption.text, words) for words in (told, other))
            yield Candidate(lie, truth, told.strip(" ,"), other.strip(" ,"), -9.0, "inherent relation")

    def _states(self, caption: ParsedCaption) -> Iterator[Candidate]:
        """What something is doing, by itself, is told otherwise."""
        for candidate in self._verbs(caption, alone=True):
            yield replace(candidate, rule="state")

    def _verbs(self, caption: ParsedCaption, alone: bool = False) -> Iterator[Candidate]:
        present = [lemma_of(verb) for verb in caption.verbs]
        for verb in caption.verbs:
            lemma = lemma_of(verb)
            follows, kind = frame(caption, verb)
            if (lemma in STATIVE and lemma != "wear") or verb.dep_ in ("aux", "xcomp"):
                continue
            if alone and follows == "dobj":
                continue
            doer = caption.subject(verb)
            unit = caption.subject_unit(doer) if doer is not None else None
            had = next((caption.unit_at(child.i) for child in verb.children if child.dep_ == "dobj"), None)
            for other, form, count in self._vocabulary.verbs[verb.tag_]:
                fitting = self._statistics.frames[f"{other}|{follows}|{kind}"]
                if not fitting and (alone or not self._statistics.frame_totals[f"{other}|{follows}"]):
                    continue
                if unit is None and alone:
                    continue
                if unit is not None and self._statistics.doers[f"{unit.kind}|{other}"] < 1:
                    continue
                if not all(self._lexicon.contrary_verb(item, other) for item in present):
                    continue
                if alone and other == "wear":
                    continue
                right = caption.right(verb.i + 1)
                weight = self._statistics.log_context(caption.left(verb.i), form, form, right)
                weight += 0.7 * math.log((fitting + 0.02) / count)
                if unit is not None:
                    weight += 0.5 * self._log_doer(unit.kind, other)
                if had is not None:
                    weight += 0.5 * self._statistics.log_governed(other, had.lemma)
                span = caption.span(verb.i, verb.i + 1)
                yield self._edited(caption, [(*span, form)], weight, "verb")

    def _exchanges(self, caption: ParsedCaption) -> Iterator[Candidate]:
        """Two things change places around a relation that is not symmetric."""
        if caption.pronouns:
            return
        for unit in caption.units:
            head = caption.tokens[unit.head]
            relation, first = self._relation_of(caption, head)
            other = caption.unit_at(first.i) if first is not None else None
            if other is None or not relation or other.end > unit.start:
                other = self._before(caption, unit)
                relation = "?"
            if other is None or self._relation_before(caption, unit) in SYMMETRIC:
                continue
            if unit.plural != other.plural and any(token.tag_ in ("VBZ", "VBP") for token in caption.tokens):
                continue
            if self._lexicon.may_be_same(unit.lemma, other.lemma) or "clothing" in (unit.kind, other.kind):
                continue
            spans = [caption.span(caption.noun_phrase_start(item), item.end) for item in (other, unit)]
            phrases = [caption.text[start:end] for start, end in spans]
            if spans[0][0] == 0:
                phrases[0] = phrases[0][:1].lower() + phrases[0][1:]
            seen = self._statistics.relations[f"{unit.kind}|{relation}|{other.kind}"]
            total = self._statistics.relations[f"{other.kind}|{relation}|{unit.kind}"]
            weight = math.log((seen + 0.1) / (total + 1.0)) - 4.5
            if relation == "?" or (not seen and not self._can_change_places(unit, other, relation, head)):
                weight -= 8.0
            text, original, replacement = apply_edits(caption.text, [(*spans[0], phrases[1]), (*spans[1], phrases[0])])
            yield Candidate(text, caption.text, original, replacement, weight, "exchange")

    def _relation_before(self, caption: ParsedCaption, unit: Unit) -> str:
        """The preposition of up to three words right before the noun phrase of `unit`, or ""."""
        start = caption.noun_phrase_start(unit)
        phrases = (" ".join(caption.words[max(start - size, 0) : start]) for size in (3, 2, 1))
        return next((phrase for phrase in phrases if phrase in SYMMETRIC | ASYMMETRIC), "")

    def _before(self, caption: ParsedCaption, unit: Unit) -> Unit | None:
        """The nearest thing before `unit` that a word of relation parts from it."""
        earlier = [item for item in caption.units if item.end <= unit.start]
        if not earlier:
            return None
        between = caption.tokens[earlier[-1].end : caption.noun_phrase_start(unit)]
        relating = [token for token in between if token.tag_ in ("IN", "VBG", "VBZ", "VBP", "VBN")]
        symmetric = SYMMETRIC | {"of", "wearing", "having"}
        if not relating or any(token.lower_ in symmetric or token.pos_ == "CCONJ" for token in between):
            return None
        return earlier[-1]

    def _can_change_places(self, unit: Unit, other: Unit, relation: str, head: Any) -> bool:
        if head.dep_ == "dobj":
            return self._statistics.doers[f"{unit.kind}|{relation}"] > 0
        return not {unit.kind, other.kind} & {"place", "room", "building", "structure"}

    def _relation_of(self, caption: ParsedCaption, head: Any) -> tuple[str, Any]:
        if head.dep_ == "dobj" and head.head.pos_ == "VERB" and lemma_of(head.head) not in STATIVE:
            return lemma_of(head.head), caption.subject(head.head)
        if head.dep_ == "pobj" and head.head.lower_ in ASYMMETRIC:
            first = head.head.head
            if first.pos_ in ("VERB", "AUX"):
                subjects = [child for child in first.children if child.dep_ == "nsubj"]
                return head.head.lower_, subjects[0] if subjects else caption.subject(first)
            return head.head.lower_, first
        return "", None

    # events

    def _replaced_events(self, caption: ParsedCaption) -> Iterator[Candidate]:
        """The caption's own event is told in a phrase at the end; the lie tells another one there."""
        if any(events(other) for other in caption.others):
            return
        for item in event_phrases(caption)[-2:]:
            subject = caption.subject_unit(item.subject)
            if subject is None:
                continue
            for event in self._events_elsewhere(caption, subject, item):
                for style, share in _EVENT_STYLES:
                    if style.startswith(" who") and subject.kind != "person":
                        continue
                    form = style.replace("are", "are" if subject.plural else "is")
                    truth, lie = (_appended(item.remainder, form + phrase) for phrase in (item.phrase, event.phrase))
                    size = len(event.phrase.split()) - len(item.phrase.split())
                    lift = self._statistics.log_together(event.subject, [subject.lemma])
                    weight = math.log(share) + 0.5 * lift - 0.3 * abs(size) + 0.5 * self._fit(caption, event)
                    yield Candidate(lie, truth, item.phrase, event.phrase, weight, "event in its place")

    def _second_events(self, caption: ParsedCaption) -> Iterator[Candidate]:
        """An event that another caption of the image tells is added; the lie adds one of another picture."""
        own = [event.sentence for other in caption.others for event in events(other)]
        own = [sentence for sentence in own if sentence.lower() not in caption.text.lower()]
        for sentence in own[:3]:
            for event in self._sampled(caption, self._statistics.events):
                if not self._is_elsewhere(caption, event):
                    continue
                truth, lie = (_appended(caption.text, f", while {item}") for item in (sentence, event.sentence))
                weight = self._fit(caption, event) - 0.3 * abs(len(event.sentence.split()) - len(sentence.split()))
                yield Candidate(lie, truth, f"while {sentence}", f"while {event.sentence}", weight, "second event")

    def _onlookers(self, caption: ParsedCaption) -> Iterator[Candidate]:
        """Of every picture it is true that somebody photographs what it shows, and false of what it cannot show."""
        shown = {unit.kind for unit in caption.units}
        shown |= {self._lexicon.kind(category) for category in caption.known_categories}
        sure = {self._lexicon.sure_kind(unit.lemma) for unit in caption.units}
        true = {_LABELS[kind] for kind in sure if kind in _LABELS}
        excluded = set(caption.words) | {label for kind in shown for label in _ALSO_SHOWN.get(kind, ())}
        pairs = [(told, other) for told in sorted(true) for other in sorted(set(_LABELS.values()) - true - excluded)]
        if not pairs:
            for unit in (*caption.units, *caption.other_nouns)[:2]:
                absent = (item for item in self._alternatives(unit) if self._is_absent(caption, unit, item[1]))
                best = sorted(absent, key=lambda item: (-item[2], item[0]))[:12]
                pairs += [(unit.phrase, phrase) for phrase, _, _ in best]
        for told, other in pairs:
            for words in _ONLOOKERS:
                truth, lie = (_appended(caption.text, f"{words} the {name}") for name in (told, other))
                start = words.strip(" ,")
                yield Candidate(lie, truth, f"{start} the {told}", f"{start} the {other}", -8.0, "onlooker")

    def _events_elsewhere(self, caption: ParsedCaption, subject: Unit, item: EventPhrase) -> list[Event]:
        found = [
            event
            for event in self._sampled(caption, self._vocabulary.events[subject.kind])
            if self._is_elsewhere(caption, event)
            and self._lexicon.contrary_verb(event.verb, item.verb)
            and abs(len(event.phrase.split()) - len(item.phrase.split())) <= 4
        ]
        return found[:40]

    def _is_elsewhere(self, caption: ParsedCaption, event: Event) -> bool:
        """Whether the event is not in the image, by all that is known."""
        if event.nouns and all(noun in caption.lemmas for noun in event.nouns):
            return False
        captions = (caption, *caption.others)
        return all(event.verb not in item.verb_lemmas for item in captions)

    def _fit(self, caption: ParsedCaption, event: Event) -> float:
        own = [unit.lemma for unit in caption.units]
        lifts = [self._statistics.log_together(noun, own) for noun in event.nouns if noun not in own]
        return sum(lifts) / len(lifts) if lifts else 0.0

    def _sampled(self, caption: ParsedCaption, pool: list[Event], size: int = 160) -> list[Event]:
        if len(pool) <= size:
            return pool
        digest = hashlib.sha256(f"{self._seed}\0{caption.text}".encode()).digest()
        start = int.from_bytes(digest[:4], "big") % len(pool)
        step = max(1, len(pool) // size)
        return [pool[(start + index * step) % len(pool)] for index in range(size)]

    def _edited(self, caption: ParsedCaption, edits: list[Edit], weight: float, rule: str) -> Candidate:
        text, original, replacement = apply_edits(caption.text, edits)
        return Candidate(text, caption.text, original, replacement, weight, rule)


# Rules that can only take from what captions say often, and so show in the text where nothing else is possible.
_ONE_WAY = frozenset({"one to several", "company", "separation"})
# Verbs of having, and what stands for them before a preposition.
_HAVING = {
    "has": "is ", "have": "are ", "having": "", "containing": "", "contains": "is ", "contain": "are ",
    "featuring": "", "features": "is ", "includes": "is ", "including": "",
}  # fmt: skip
# Objects of these can be told in another number without a change elsewhere.
_COUNTED_AFTER = word_set(
    "^ of with near beside by to hold carry eat watch have pull push fly cut chase feed see drive park contain"
)
_EVENT_STYLES = ((", ", 0.6), (" seen ", 0.1), (", pictured ", 0.1), (" who are ", 0.2))
_ONLOOKERS = (
    ", as someone takes a picture of",
    ", while someone photographs",
    ", with someone taking a photo of",
    ", as a camera is pointed at",
)
_LABELS = {
    "animal": "animal", "vehicle": "vehicle", "food": "food", "room": "room", "drink": "food",
    "building": "buildings", "furniture": "furniture", "place": "landscape", "plant": "plants",
    "vessel": "dishes", "indoor": "furniture", "bedding": "furniture", "device": "furniture",
}  # fmt: skip
# What a picture of one kind of thing may well show beside it.
_INDOORS = ("furniture", "room", "plants", "dishes", "food")
_OUTDOORS = ("landscape", "buildings", "plants", "street")
_ALSO_SHOWN = {
    "room": _INDOORS, "furniture": _INDOORS, "device": _INDOORS, "indoor": _INDOORS, "bedding": _INDOORS,
    "vessel": _INDOORS, "food": _INDOORS, "drink": _INDOORS, "place": _OUTDOORS,
    "vehicle": (*_OUTDOORS, "vehicle"), "building": _OUTDOORS, "structure": (*_OUTDOORS, "vehicle"),
    "plant": _OUTDOORS, "sport": _OUTDOORS, "animal": (*_OUTDOORS, "animal"),
}  # fmt: skip


def _appended(text: str, addition: str) -> str:
    """`text` with words before its closing full stop."""
    body = text.rstrip(" .!,;:")
    closing = "." if "." in text[len(body) :] else ""
    return f"{body}{addition}{closing}"
