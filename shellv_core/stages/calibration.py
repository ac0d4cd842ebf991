"""What the hallucination view is worth: asked about pictures whose content is known, on halves of them apart.

A served model describes each picture of a split. An object that it mentions is made up if it is not in the picture, a
sentence if it mentions such an object (those that mention none are left out). On one half of the pictures thresholds
and risks are fitted, on the other they are measured. The blind baseline knows the text alone: how common an object is
in the first half, and how close the heads hold a sentence to a blank picture.
"""

from __future__ import annotations

import asyncio
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from shellv_core.data.objects import find_mentions
from shellv_core.errors import EvaluationError
from shellv_core.evaluation.detection import Scored, area, best_threshold, calibration, fit_risk, roc
from shellv_core.progress import Progress
from shellv_core.serving.engine import Engine, GenerationRequest, ImagePart, Message, TextPart, TokenLogprob
from shellv_core.serving.hallucination import MAX_SENTENCES, Threshold, Thresholds, make_view, split_sentences

if TYPE_CHECKING:
    from shellv_core.data.samples import Sample
    from shellv_core.serving.inference.grounding import HeadsGrounding

PROMPTS = ("Describe the image.", "Describe the image in detail.")
#: Fewer of one kind fit nothing.
LEAST = 5


@dataclass(frozen=True)
class SeenObject:
    """An object that an answer mentions: the logarithms of its confidence and of its probability."""

    image: str
    name: str
    confidence: float
    probability: float
    false: bool


@dataclass(frozen=True)
class SeenSentence:
    """A sentence with what may tell whether it is made up.

    Attributes:
        kind: the type of a hallucinated caption, ``caption`` for a true one; "" in an answer.
        objects: the least log-confidence of its objects; of sentences in answers.
        similarity: cosine to the picture.
        blank: cosine to a blank picture.
    """

    image: str
    text: str
    false: bool
    kind: str = ""
    objects: float = 0.0
    similarity: float = 0.0
    blank: float = 0.0


@dataclass(frozen=True)
class Observations:
    """All that was seen, with how common each class is in pictures; `grounded` tells whether there were heads."""

    objects: tuple[SeenObject, ...]
    sentences: tuple[SeenSentence, ...]
    captions: tuple[SeenSentence, ...]
    present: dict[str, frozenset[str]]
    grounded: bool


async def observe(
    engine: Engine, grounding: HeadsGrounding | None, samples: Sequence[Sample], max_tokens: int, at_once: int
) -> Observations:
    """Ask about `samples`, all with a picture and known objects, greedily."""
    objects: list[SeenObject] = []
    sentences: list[SeenSentence] = []
    captions: list[SeenSentence] = []
    present = {sample.key: _present(sample) for sample in samples}
    places = asyncio.Semaphore(at_once)
    with Progress(len(samples), "describing pictures", "pictures") as progress:

        async def one(sample: Sample) -> None:
            async with places:
                image = _picture(sample)
                for prompt in PROMPTS:
                    text, logprobs = await _answer(engine, image, prompt, max_tokens)
                    seen, told = _judge(sample.key, text, logprobs, present[sample.key])
                    objects.extend(seen)
                    sentences.extend(await _grounded(grounding, image, told))
                captions.extend(await _grounded(grounding, image, _captions(sample)))
                progress.update()

        await asyncio.gather(*(one(sample) for sample in samples))
    ordered = [sorted(each, key=lambda seen: seen.image) for each in (objects, sentences, captions)]
    return Observations(
        tuple(ordered[0]),  # type: ignore[arg-type]
        tuple(ordered[1]),  # type: ignore[arg-type]
        tuple(ordered[2]),  # type: ignore[arg-type]
        present,
        grounding is not None,
    )


def calibrate(seen: Observations, revision: str, seed: int = 0) -> tuple[Thresholds, dict[str, Any]]:
    """Thresholds fitted on one half of the pictures, and figures of the other.

    Raises:
        EvaluationError: if too few objects of either kind were mentioned to fit anything.
    """
    images = sorted(seen.present)
    Random(seed).shuffle(images)
    fitting = frozenset(images[: len(images) // 2])
    common = _commonness([seen.present[image] for image in fitting])

    def halves(items: Sequence[Any]) -> tuple[list[Any], list[Any]]:
        return [item for item in items if item.image in fitting], [item for item in items if item.image not in fitting]

    first, second = halves(seen.objects)
    object_threshold = _fit(_scored(first, _confidence))
    if object_threshold is None:
        raise EvaluationError(
            f"among {len(first)} objects that the model mentioned in {len(fitting)} pictures,"
            f" {sum(each.false for each in first)} are made up; at least {LEAST} of either kind are needed. Raise"
            " --images."
        )
    figures: dict[str, Any] = {
        "pictures": {"fitting": len(fitting), "measuring": len(images) - len(fitting)},
        "objects": _figures(
            second,
            {
                "confidence": _confidence,
                "probability": lambda each: each.probability,
                "blind: how common it is": lambda each: common.get(each.name, 0.0),
            },
            object_threshold,
            seed,
        ),
    }
    raw = [1 - math.exp(each.confidence) for each in second]
    figures["objects"]["raw_calibration_error"] = calibration(raw, [each.false for each in second])[0]
    sentence_threshold = None
    first, second = halves(seen.sentences)
    if seen.grounded:
        sentence_threshold = _fit(_scored(first, _margin))
    scores: dict[str, Callable[[SeenSentence], float]] = {"least confidence of its objects": lambda each: each.objects}
    if seen.grounded:
        scores = {
            "margin": _margin,
            "similarity": lambda each: each.similarity,
            "blind: blank picture": _blank,
        } | scores
    figures["sentences"] = _figures(second, scores, sentence_threshold, seed)
    if seen.grounded:
        figures["captions"] = _caption_figures(halves(seen.captions)[1], seed)
    return Thresholds(
        revision=revision, object_confidence=object_threshold, sentence_margin=sentence_threshold
    ), figures


def _present(sample: Sample) -> frozenset[str]:
    """Classes in the picture: those annotated and those that the true caption mentions, as CHAIR counts."""
    told = {mention.category for mention in find_mentions(sample.caption or "")}
    return frozenset(each.category for each in sample.objects) | told


def _picture(sample: Sample) -> Any:
    from PIL import Image

    return Image.open(io.BytesIO(sample.image or b"")).convert("RGB")


async def _answer(engine: Engine, image: Any, prompt: str, max_tokens: int) -> tuple[str, list[TokenLogprob]]:
    request = GenerationRequest(
        (Message("user", (ImagePart(image), TextPart(prompt))),), max_tokens=max_tokens, logprobs=True
    )
    texts: list[str] = []
    logprobs: list[TokenLogprob] = []
    async for event in engine.generate(request):
        texts.append(event.text)
        logprobs += event.logprobs
    return "".join(texts), logprobs


def _judge(
    image: str, text: str, logprobs: Sequence[TokenLogprob], present: frozenset[str]
) -> tuple[list[SeenObject], list[SeenSentence]]:
    view = make_view(text, logprobs)
    objects = [
        SeenObject(image, each.name, _log(each.confidence), _log(each.probability), each.name not in present)
        for each in view.objects
    ]
    sentences = []
    for start, end in split_sentences(text)[:MAX_SENTENCES]:
        within = [
            seen for each, seen in zip(view.objects, objects, strict=True) if start <= each.start and each.end <= end
        ]
        if within:
            false, least = any(seen.false for seen in within), min(seen.confidence for seen in within)
            sentences.append(SeenSentence(image, text[start:end], false, objects=least))
    return objects, sentences


def _captions(sample: Sample) -> list[SeenSentence]:
    if not sample.caption:
        return []
    lies = [SeenSentence(sample.key, each.text, True, each.type) for each in sample.hallucinated_captions]
    return [SeenSentence(sample.key, sample.caption, False, "caption"), *lies]


async def _grounded(
    grounding: HeadsGrounding | None, image: Any, sentences: Sequence[SeenSentence]
) -> list[SeenSentence]:
    if grounding is None or not sentences:
        return list(sentences)
    images_ID, blank_D, texts_SD = await grounding.embeddings([image], [each.text for each in sentences])
    similar, blank = (texts_SD @ images_ID[0]).tolist(), (texts_SD @ blank_D).tolist()
    return [
        SeenSentence(**asdict(each) | {"similarity": similar[index], "blank": blank[index]})
        for index, each in enumerate(sentences)
    ]


def _fit(items: Sequence[Scored]) -> Threshold | None:
    false = sum(item.false for item in items)
    if min(false, len(items) - false) < LEAST:
        return None
    slope, intercept = fit_risk(items)
    return Threshold(below=best_threshold(items), slope=slope, intercept=intercept)


def _figures(
    items: Sequence[Any], scores: dict[str, Callable[[Any], float]], threshold: Threshold | None, seed: int
) -> dict[str, Any]:
    figures: dict[str, Any] = {
        "count": len(items),
        "false": sum(each.false for each in items),
        "area": {name: asdict(area(_scored(items, score), seed)) for name, score in scores.items()},
        "roc": {},
    }
    if 0 < figures["false"] < figures["count"]:
        figures["roc"] = {name: roc(_scored(items, score)) for name, score in scores.items()}
    if threshold is not None and items:
        scored = _scored(items, next(iter(scores.values())))
        error, bins = calibration([threshold.risk(each.score) for each in scored], [each.false for each in scored])
        marked = [each for each in scored if each.score < threshold.below]
        caught = sum(each.false for each in marked)
        figures |= {
            "calibration_error": error,
            "bins": [asdict(each) for each in bins],
            "marked": len(marked),
            "precision": caught / len(marked) if marked else None,
            "recall": caught / figures["false"] if figures["false"] else None,
        }
    return figures


def _caption_figures(captions: Sequence[SeenSentence], seed: int) -> dict[str, Any]:
    """Of each kind of hallucinated caption: areas against true captions, and how often it has the lower margin."""
    truths = {each.image: each for each in captions if not each.false}
    figures = {}
    for kind in sorted({each.kind for each in captions if each.false}):
        lies = [each for each in captions if each.kind == kind and each.image in truths]
        both = [*lies, *(truths[image] for image in {each.image for each in lies})]
        figures[kind] = {
            "pairs": len(lies),
            "area": asdict(area(_scored(both, _margin), seed)),
            "blind_area": asdict(area(_scored(both, _blank), seed)),
            "lower_margin": sum(_margin(each) < _margin(truths[each.image]) for each in lies) / len(lies),
            "blind_lower": sum(each.blank < truths[each.image].blank for each in lies) / len(lies),
        }
    return figures


def _scored(items: Sequence[Any], score: Callable[[Any], float]) -> list[Scored]:
    return [Scored(score(each), each.false, each.image) for each in items]


def _confidence(each: SeenObject) -> float:
    return each.confidence


def _margin(each: SeenSentence) -> float:
    return each.similarity - each.blank


def _blank(each: SeenSentence) -> float:
    return each.blank


def _log(probability: float) -> float:
    return math.log(max(probability, 1e-300))


def _commonness(pictures: Sequence[frozenset[str]]) -> dict[str, float]:
    names = {name for picture in pictures for name in picture}
    return {name: sum(name in picture for picture in pictures) / len(pictures) for name in names}
