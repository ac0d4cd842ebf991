"""What in an answer may be made up: the objects that it mentions, and its sentences, each with how far to trust it.

An object's confidence is the model's own: the probability of the tokens that spell it. A sentence's margin is HACL's:
how much closer the heads hold it to the picture than to a blank one. Neither is a probability of being true; what they
are worth on scenes whose truth is known is measured by ``shellv calibrate``, which also finds the thresholds.
"""

from __future__ import annotations

import codecs
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from pydantic import Field, ValidationError

from shellv_core.config import Config
from shellv_core.data.objects import find_mentions
from shellv_core.errors import ServingError
from shellv_core.serving.engine import TokenLogprob

if TYPE_CHECKING:
    from PIL import Image

#: Sentences of one answer whose margin is computed; those behind have none.
MAX_SENTENCES = 32
# An ending mark with what closes behind it, before white space; or a line's end.
_SENTENCE_END = re.compile(r"[.!?。！？]+[\"'”’)\]]*(?=\s|$)|[。！？]|\n+")
_LETTER = re.compile(r"\w")


class Threshold(Config):
    """Where to mark, and what a score means, as fitted on pictures whose content is known.

    Attributes:
        below: what scores lower is marked.
        slope, intercept: the risk of being made up is ``1 / (1 + exp(-(slope * score + intercept)))``.
    """

    below: float
    slope: float = Field(le=0.0)
    intercept: float

    def risk(self, score: float) -> float:
        """The probability, in [0, 1], that what has this score is made up."""
        return 1 / (1 + math.exp(min(-(self.slope * score + self.intercept), 700.0)))


class Thresholds(Config):
    """What ``shellv calibrate`` found for one model.

    Attributes:
        revision: of the model that they are for (`ServedModel.revision`).
        object_confidence: over the logarithm of an object's confidence.
        sentence_margin: over a sentence's margin; None for a model without heads.
    """

    revision: str
    object_confidence: Threshold
    sentence_margin: Threshold | None = None


@dataclass(frozen=True)
class ObjectView:
    """A mention of an object: ``text[start:end]`` of the answer, in characters.

    Attributes:
        name: the class of COCO that is meant.
        confidence: geometric mean of the probabilities of the tokens that spell it, in [0, 1].
        probability: their product: how likely the model was to say just this.
        risk: probability, by the thresholds, that it is not in the picture; None without any.
        marked: whether its confidence is under its threshold; None without any.
    """

    name: str
    text: str
    start: int
    end: int
    confidence: float
    probability: float
    risk: float | None = None
    marked: bool | None = None


@dataclass(frozen=True)
class SentenceView:
    """A sentence: ``text[start:end]`` of the answer, in characters.

    Attributes:
        confidence: geometric mean of the probabilities of its tokens, in [0, 1].
        margin: cosine to the picture less cosine to a blank one, in [-2, 2]; None without heads or picture.
        risk, marked: as of an object, by the margin.
    """

    text: str
    start: int
    end: int
    confidence: float
    margin: float | None = None
    risk: float | None = None
    marked: bool | None = None


@dataclass(frozen=True)
class HallucinationView:
    """An answer's mentions of objects and its sentences, both in order."""

    objects: tuple[ObjectView, ...]
    sentences: tuple[SentenceView, ...]


class Grounding(Protocol):
    """What tells how well sentences fit pictures."""

    async def margins(self, images: Sequence[Image.Image], sentences: Sequence[str]) -> list[float]:
        """Each sentence's margin to the picture that it fits best.

        Raises:
            EngineStoppedError: if the engine takes no more work.
        """
        ...


async def view_answer(
    text: str,
    logprobs: Sequence[TokenLogprob],
    images: Sequence[Image.Image] = (),
    grounding: Grounding | None = None,
    thresholds: Thresholds | None = None,
) -> HallucinationView:
    """The view of a whole answer.

    Args:
        text: the answer.
        logprobs: of all its tokens, those that left no text included.
        images: the pictures that it is about.
        grounding: from the model's heads, if it has some.
    """
    spans = split_sentences(text)
    margins: list[float] = []
    if grounding is not None and images and spans:
        margins = await grounding.margins(images, [text[start:end] for start, end in spans[:MAX_SENTENCES]])
    return make_view(text, logprobs, margins, thresholds)


def make_view(
    text: str, logprobs: Sequence[TokenLogprob], margins: Sequence[float] = (), thresholds: Thresholds | None = None
) -> HallucinationView:
    """The view from what is known already; `margins` are those of the first sentences."""
    tokens = place_tokens(text, logprobs)
    objects = []
    for mention in find_mentions(text):
        chosen = _overlapping(tokens, mention.start, mention.end)
        mean = sum(chosen) / len(chosen) if chosen else 0.0
        threshold = thresholds.object_confidence if thresholds else None
        objects.append(
            ObjectView(
                mention.category,
                text[mention.start : mention.end],
                mention.start,
                mention.end,
                math.exp(mean),
                math.exp(sum(chosen)),
                threshold.risk(mean) if threshold else None,
                mean < threshold.below if threshold else None,
            )
        )
    sentences = []
    for index, (start, end) in enumerate(split_sentences(text)):
        chosen = _overlapping(tokens, start, end)
        margin = margins[index] if index < len(margins) else None
        threshold = thresholds.sentence_margin if thresholds and margin is not None else None
        sentences.append(
            SentenceView(
                text[start:end],
                start,
                end,
                math.exp(sum(chosen) / len(chosen)) if chosen else 1.0,
                margin,
                threshold.risk(margin) if threshold and margin is not None else None,
                margin < threshold.below if threshold and margin is not None else None,
            )
        )
    return HallucinationView(tuple(objects), tuple(sentences))


def split_sentences(text: str) -> list[tuple[int, int]]:
    """Start and end of each sentence in `text`, white space around left out.

    A sentence ends at ``. ! ?`` before white space, at their Chinese forms, and at a line's end; what holds no letter
    or digit is none.
    """
    spans = []
    start = 0
    for end in [*(match.end() for match in _SENTENCE_END.finditer(text)), len(text)]:
        piece = text[start:end]
        if _LETTER.search(piece):
            left = start + len(piece) - len(piece.lstrip())
            spans.append((left, left + len(piece.strip())))
            start = end
    return spans


def place_tokens(text: str, logprobs: Sequence[TokenLogprob]) -> list[tuple[int, int, float]]:
    """Start, end and log-probability of each token that left something in `text`, in characters.

    A character of several tokens belongs to each of them. The white space before the answer's first word, and what
    follows the cut at a stop string, are not in `text`.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    whole, pieces = "", []
    for each in logprobs:
        begin = len(whole)
        whole += decoder.decode(each.bytes)
        unfinished = bool(decoder.getstate()[0])
        pieces.append((begin, len(whole) + unfinished, each.logprob))
    offset = len(whole) - len(whole.lstrip())
    placed = [(max(begin - offset, 0), min(end - offset, len(text)), logprob) for begin, end, logprob in pieces]
    return [(begin, end, logprob) for begin, end, logprob in placed if begin < end]


def read_thresholds(path: Path) -> Thresholds:
    """Read the file that ``shellv calibrate`` wrote.

    Raises:
        ServingError: if it cannot be read, or holds something else.
    """
    try:
        return Thresholds.model_validate_json(path.read_bytes())
    except OSError as error:
        raise ServingError(f"{path} cannot be read ({error.strerror}); make it with: shellv calibrate.") from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"])) or "file"
        raise ServingError(
            f"{path} holds no thresholds ({where}: {first['msg']}); make it anew with: shellv calibrate."
        ) from None


def _overlapping(tokens: Sequence[tuple[int, int, float]], start: int, end: int) -> list[float]:
    return [logprob for begin, stop, logprob in tokens if begin < end and stop > start]
