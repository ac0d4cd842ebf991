"""What a language model is asked, and what is taken from its answer. Knows nothing of how the model is reached."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, Protocol

from shellv_core.data.hallucination.captions import Caption, Rewrite, RewriteCounts, RewrittenCaption
from shellv_core.data.hallucination.config import HallucinationConfig
from shellv_core.data.hallucination.filtering import changed_words, reject_reason
from shellv_core.data.hallucination.grammar import Parser
from shellv_core.data.samples import HallucinatedCaption
from shellv_core.endpoint.asking import Reply

_CHUNK = 256

INSTRUCTION = """\
You are given a true caption of a picture. Write false captions of the same picture, one of each type:
object: name another thing in place of one that is named; the new thing often goes with the rest.
attribute: change the color, size, number, material or state of one thing.
relation: change where one thing is relative to another, or who does what to whom.
event: add a short clause with something that does not happen in the picture.
Keep all other words and the caption's own style, punctuation and capital letters. Each false caption must be fluent, \
believable, and certainly false. For the event also write "truth": the caption with a clause of the same length and \
style added that is certainly true, because it only says again what the caption tells.
Answer with JSON alone: {"object": {"text": "..."}, "attribute": {"text": "..."}, "relation": {"text": "..."}, \
"event": {"text": "...", "truth": "..."}}"""


class Answerer(Protocol):
    """Whoever answers prompts: a local model or an endpoint."""

    def answer(self, prompts: Sequence[str], counts: RewriteCounts) -> list[Reply]:
        """One answer for each prompt, in order; faults are returned, not raised."""
        ...


def prompt_of(caption: Caption, types: Sequence[str]) -> str:
    """The question about one caption."""
    lines = [f"Caption: {caption.text.strip()}"]
    if caption.objects:
        named = sorted({item.category for item in caption.objects})
        lines.append(f"Also in the picture, so not to be used as false objects: {', '.join(named)}")
    if caption.other_captions:
        lines.append("Other true captions: " + " | ".join(text.strip() for text in caption.other_captions))
    lines.append(f"Types: {', '.join(types)}")
    return "\n".join(lines)


def parse_answer(text: str, caption: Caption, types: Sequence[str]) -> tuple[dict[str, Rewrite], dict[str, str]]:
    """Read the model's JSON strictly.

    Returns:
        Rewrites by type, and for each type without one the reason: "no JSON", "no such type" or "malformed".
    """
    try:
        record = json.loads(_without_fence(text))
    except ValueError:
        return {}, dict.fromkeys(types, "no JSON")
    if not isinstance(record, dict):
        return {}, dict.fromkeys(types, "no JSON")
    rewrites: dict[str, Rewrite] = {}
    faults: dict[str, str] = {}
    for kind in types:
        item = record.get(kind)
        if item is None:
            faults[kind] = "no such type"
            continue
        allowed = {"text", "truth"} if kind == "event" else {"text"}
        if (
            not isinstance(item, dict)
            or set(item) != allowed
            or not all(isinstance(part, str) for part in item.values())
        ):
            faults[kind] = "malformed"
            continue
        truth = _spaced_as(item.get("truth", caption.text), caption.text)
        lie = _spaced_as(item["text"], caption.text)
        before, after = changed_words(truth, lie)
        hallucinated = HallucinatedCaption(kind, lie, " ".join(before), " ".join(after))  # type: ignore[arg-type]
        rewrites[kind] = Rewrite(hallucinated, truth)
    return rewrites, faults


class LanguageModelGenerator:
    """Rewrites captions by asking a language model; whatever the filter rejects or the model does not give is missing.

    There is nothing to fit, so the state is empty.
    """

    def __init__(self, config: HallucinationConfig, answerer: Answerer) -> None:
        self._config = config
        self._answerer = answerer
        self._parser = Parser(config.rules.batch_size)

    def rewrite(self, captions: Iterable[Caption], counts: RewriteCounts) -> Iterator[RewrittenCaption]:
        """Yield each caption with its rewrites, in order; `counts` is added to."""
        iterator = iter(captions)
        while chunk := list(islice(iterator, _CHUNK)):
            prompts = [prompt_of(caption, self._config.types) for caption in chunk]
            for caption, answer in zip(chunk, self._answerer.answer(prompts, counts), strict=True):
                yield RewrittenCaption(caption, tuple(self._accepted(caption, answer, counts)))
            counts.captions += len(chunk)

    def _accepted(self, caption: Caption, answer: Reply, counts: RewriteCounts) -> Iterator[Rewrite]:
        types = self._config.types
        if answer.fault:
            counts.missing.update(f"{kind}: {answer.fault}" for kind in types)
            return
        rewrites, faults = parse_answer(answer.text, caption, types)
        counts.missing.update(f"{kind}: {fault}" for kind, fault in faults.items())
        texts = [text for item in rewrites.values() for text in (item.truth, item.hallucinated.text)]
        docs = list(self._parser.parse(text.strip() for text in texts))
        seen: set[str] = set()
        for index, (kind, rewrite) in enumerate(rewrites.items()):
            reason = reject_reason(caption, rewrite, self._config.filter, docs[2 * index], docs[2 * index + 1])
            if reason is None and rewrite.hallucinated.text in seen:
                reason = "same as another type's"
            if reason is None:
                counts.kept[kind] += 1
                seen.add(rewrite.hallucinated.text)
                yield rewrite
            else:
                counts.rejected[f"{kind}: {reason}"] += 1
                counts.missing[f"{kind}: rejected"] += 1


def chat_messages(prompt: str) -> list[dict[str, Any]]:
    """The prompt as chat messages."""
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": prompt}]


def _without_fence(text: str) -> str:
    """JSON that is wrapped in a Markdown fence, as chat models do it, without the fence."""
    body = text.strip()
    if body.startswith("```") and body.endswith("```") and "\n" in body:
        body = body.split("\n", 1)[1].rsplit("```", 1)[0]
    return body


def _spaced_as(text: str, caption: str) -> str:
    lead = caption[: len(caption) - len(caption.lstrip())]
    return lead + text.strip() + caption[len(caption.rstrip()) :]
