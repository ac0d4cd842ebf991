"""What a lie must be: changed, false by all that is known, of its type, grammatical, and about as long as its truth.

Pure functions of texts and parses; every generator's rewrites pass here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from shellv_core.data.hallucination.captions import Caption, Rewrite
from shellv_core.data.hallucination.config import FilterConfig
from shellv_core.data.hallucination.grammar import wrong_articles
from shellv_core.data.hallucination.lexicon import CONTRARY_PREPOSITIONS, load_lexicon
from shellv_core.data.objects import find_mentions

_WORD = re.compile(r"\w+(?:['-]\w+)*")
_DOUBLED = re.compile(r"\b(\w+) \1\b", re.IGNORECASE)
_SINGULAR_DETERMINERS = frozenset({"a", "an", "one", "each", "this", "that", "another"})
_PLURAL_DETERMINERS = frozenset({"two", "three", "four", "five", "six", "seven", "eight", "many", "several", "these"})
_ATTRIBUTE_TAGS = frozenset(
    {"JJ", "JJR", "JJS", "CD", "VBN", "VBG", "NN", "NNP", "RB", "NNS", "DT", "VBD", "VBZ",
     "VBP", "VB"}
)  # fmt: skip
_RELATION_TAGS = frozenset({"IN", "RP", "TO", "RB", "VBG", "VBZ", "VBP", "VBN", "VBD", "VB", "JJ", "NN", "NNS", "CC"})


def changed_words(truth: str, lie: str) -> tuple[list[str], list[str]]:
    """The words of each text between their common beginning and their common end, in lower case."""
    first, second = (_WORD.findall(text.lower()) for text in (truth, lie))
    start = 0
    while start < min(len(first), len(second)) and first[start] == second[start]:
        start += 1
    end = 0
    while end < min(len(first), len(second)) - start and first[-1 - end] == second[-1 - end]:
        end += 1
    return first[start : len(first) - end], second[start : len(second) - end]


def reject_reason(
    caption: Caption, rewrite: Rewrite, config: FilterConfig, truth: Any = None, lie: Any = None
) -> str | None:
    """Why a rewrite is not taken, or None if it is.

    Args:
        caption: The source, with what else is known of its image.
        rewrite: The proposal.
        config: Limits.
        truth: spaCy Doc of the rewrite's truth; without it and
        lie: the Doc of its text, the checks that need a parse are left out.

    Returns:
        "empty", "unchanged", "equals another caption", "still true", "object is in the image", "length", "article",
        "doubled word", "agreement", "wrong type", or None.
    """
    kind, text = rewrite.hallucinated.type, rewrite.hallucinated.text
    before, after = changed_words(rewrite.truth, text)
    if not _WORD.search(text):
        return "empty"
    if _plain(text) in (_plain(caption.text), _plain(rewrite.truth)) or not (before or after):
        return "unchanged"
    if _plain(text) in {_plain(other) for other in caption.other_captions}:
        return "equals another caption"
    checks: list[tuple[str, Callable[[], bool]]] = [
        ("still true", lambda: _still_true(kind, before, after, truth, lie)),
        ("object is in the image", lambda: kind == "object" and _is_known(caption, before, after)),
        ("length", lambda: _length_differs(kind, rewrite.truth, text, config)),
        ("article", lambda: wrong_articles(text) > wrong_articles(rewrite.truth)),
        ("doubled word", lambda: len(_DOUBLED.findall(text)) > len(_DOUBLED.findall(rewrite.truth))),
    ]
    if lie is not None and truth is not None:
        checks.append(("agreement", lambda: disagreements(lie) > disagreements(truth)))
        checks.append(("wrong type", lambda: not _is_of_type(kind, before, after, truth, lie)))
    return next((reason for reason, fails in checks if fails()), None)


def disagreements(doc: Any) -> int:
    """Determiners and finite verbs that do not agree in number with their noun, as far as the parse tells."""
    found = 0
    for token in doc:
        if token.dep_ in ("det", "nummod") and token.head.tag_ in ("NN", "NNS"):
            plural = token.head.tag_ == "NNS"
            found += plural and token.lower_ in _SINGULAR_DETERMINERS and token.head.lemma_ != token.head.lower_
            found += not plural and token.lower_ in _PLURAL_DETERMINERS
        elif token.dep_ == "nsubj" and token.tag_ in ("NN", "NNS") and token.i < token.head.i:
            conjoined = any(child.dep_ == "conj" for child in token.children)
            auxiliaries = [child for child in token.head.children if child.dep_ == "aux"]
            verb = auxiliaries[0] if auxiliaries else token.head
            if not conjoined and verb.lower_ in ("is", "are", "has", "have", "was", "were"):
                found += (token.tag_ == "NNS") == (verb.lower_ in ("is", "has", "was"))
    return int(found)


def _still_true(kind: str, before: list[str], after: list[str], truth: Any, lie: Any) -> bool:
    lexicon = load_lexicon()
    if kind == "object" and before and after:
        first, second = (_singular(words, doc) for words, doc in ((before, truth), (after, lie)))
        return lexicon.may_be_same(first, second)
    if kind == "attribute" and len(before) == len(after) == 1:
        near = lexicon.near_adjectives(before[0])
        return after[0] in near and after[0] not in lexicon.contrary_adjectives(before[0])
    if kind == "relation" and len(before) == len(after) == 1 and before[0] in CONTRARY_PREPOSITIONS:
        return after[0] in _SAME_RELATIONS.get(before[0], ())
    if kind == "event":
        return not set(after) - set(before)
    return False


_SAME_RELATIONS = {
    first: frozenset(group) - {first}
    for group in (
        ("on", "atop", "upon"), ("near", "by", "beside", "alongside"), ("under", "below", "beneath", "underneath"),
        ("in", "inside", "within"), ("above", "over"), ("towards", "toward"), ("through", "thru"),
    )
    for first in group
}  # fmt: skip


def _singular(words: list[str], doc: Any) -> str:
    """The changed words with the last in the singular, articles and numbers left out."""
    kept = [
        word for word in words if word not in _SINGULAR_DETERMINERS | _PLURAL_DETERMINERS | {"the", "some"}
    ] or words
    if doc is not None:
        lemma = next((token.lemma_.lower() for token in doc if token.lower_ == kept[-1]), kept[-1])
        kept = [*kept[:-1], lemma]
    return " ".join(kept)


def _is_known(caption: Caption, before: list[str], after: list[str]) -> bool:
    own = {mention.category for mention in find_mentions(" ".join(before))}
    new = {mention.category for mention in find_mentions(" ".join(after))}
    known = {item.category for item in caption.objects}
    for text in caption.other_captions:
        known.update(mention.category for mention in find_mentions(text))
    return bool(new & known - (own & {"person"}))


def _length_differs(kind: str, truth: str, lie: str, config: FilterConfig) -> bool:
    sizes = [len(_WORD.findall(text)) for text in (truth, lie)]
    change = abs(sizes[1] - sizes[0])
    if kind == "event":
        return sizes[1] - sizes[0] > config.max_event_words
    return change > max(config.min_allowed_words, config.max_length_change * sizes[0])


def _is_of_type(kind: str, before: list[str], after: list[str], truth: Any, lie: Any) -> bool:
    old, new = _tokens(before, truth), _tokens(after, lie)
    if kind == "object":
        return any(token.pos_ in ("NOUN", "PROPN") for token in new)
    if kind == "attribute":
        return any(token.tag_ in _ATTRIBUTE_TAGS for token in new)
    if kind == "relation":
        return all(any(token.tag_ in _RELATION_TAGS for token in side) for side in (old, new) if side)
    return any(token.pos_ in ("VERB", "AUX") or token.tag_ in ("VBG", "VBN") for token in new) or any(
        token.lower_ in ("as", "while", "with") for token in lie
    )


def _tokens(words: list[str], doc: Any) -> list[Any]:
    wanted = {part for word in words for part in re.split(r"['-]", word)} | set(words)
    return [token for token in doc if token.lower_ in wanted]


def _plain(text: str) -> str:
    return " ".join(_WORD.findall(text.lower()))
