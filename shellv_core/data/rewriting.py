"""Gives the samples of a data set hallucinated captions: learns from some of them once, then rewrites unit by unit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import islice
from typing import Any

from shellv_core.data.ahead import map_ahead
from shellv_core.data.hallucination.captions import Caption, Rewrite, RewriteCounts, RewrittenCaption
from shellv_core.data.hallucination.config import HallucinationConfig
from shellv_core.data.hallucination.generator import build_generator, quality_record
from shellv_core.data.plan import SCENES, Plan, Unit
from shellv_core.data.samples import HallucinatedCaption, Sample
from shellv_core.data.sources.base import RejectedRow, Source
from shellv_core.data.sources.checks import CAPTION_INSTRUCTIONS
from shellv_core.errors import DataError
from shellv_core.progress import progress

_FIT_UNITS = 64  # from which the captions to learn from are taken, evenly over the plan
_READS = 16
_MEASURED = 8000  # captions whose lies are measured


class Rewriter:
    """Rewrites captions with what was learnt.

    Args:
        config: which lies, and how.
        state: what `learn` returned.
    """

    def __init__(self, config: HallucinationConfig, state: bytes) -> None:
        self._generator, self._state = build_generator(config), state

    def rewrite(self, samples: Sequence[Sample]) -> tuple[list[Sample], RewriteCounts, list[RewrittenCaption]]:
        """The samples with lies where they had a caption and none; the counts; and the rewritten captions."""
        counts = RewriteCounts()
        chosen = [number for number, sample in enumerate(samples) if _wants_lies(sample)]
        rewritten = list(self._generator.rewrite([_caption(samples[number]) for number in chosen], self._state, counts))
        result = list(samples)
        for number, found in zip(chosen, rewritten, strict=True):
            lies = tuple(_with_truth(rewrite, found.caption.text) for rewrite in found.rewrites)
            result[number] = replace(result[number], hallucinated_captions=lies)
        return result, counts, rewritten


def learn(config: HallucinationConfig, plan: Plan, sources: Mapping[str, Source]) -> bytes:
    """What the generator learns from captions of the whole data set; JSON, b"" where it learns nothing.

    Raises:
        DataError: if there is no caption to learn from.
    """
    units = [unit for unit in plan.units if unit.source != SCENES]
    number = config.rules.num_fit_captions
    complete = sum(unit.count for unit in units) <= number
    chosen = units if complete else units[:: -(-len(units) // _FIT_UNITS)]
    share = number if complete else -(-number // len(chosen))
    return build_generator(config).fit(_captions(chosen, sources, share), complete)


def quality(records: Sequence[Mapping[str, Any]], pairs: Sequence[Any], config: HallucinationConfig) -> dict[str, Any]:
    """What the manifest keeps of the units' records and pairs; see `measured_pairs`.

    Without enough pairs to measure, the record says why instead of the figures.
    """
    counts = RewriteCounts()
    for record in records:
        counts.add(RewriteCounts.from_record(record))
    captions = [
        RewrittenCaption(
            Caption(""), tuple(Rewrite(HallucinatedCaption(kind, lie), truth) for kind, truth, lie in caption)
        )
        for caption in pairs
    ]
    try:
        return quality_record(captions, counts, config)
    except DataError as error:
        return counts.to_record() | {"text_only_pair_accuracy": {}, "not_measured": str(error)}


def measured_pairs(rewritten: Sequence[RewrittenCaption], num_units: int) -> list[list[list[str]]]:
    """(type, truth, lie) of a unit's share of the captions that are measured, by caption."""
    share = -(-_MEASURED // max(num_units, 1))
    return [
        [[rewrite.hallucinated.type, rewrite.truth, rewrite.hallucinated.text] for rewrite in caption.rewrites]
        for caption in rewritten[:share]
    ]


def _wants_lies(sample: Sample) -> bool:
    return bool(sample.caption and sample.caption.strip()) and not sample.hallucinated_captions


def _caption(sample: Sample) -> Caption:
    """The caption with what is known to be true of its image: objects, and answers that are captions themselves."""
    others = [
        conversation[1]["value"]
        for conversation in (sample.conversations, *sample.more_conversations)
        if len(conversation) == 2 and conversation[0]["value"].endswith(CAPTION_INSTRUCTIONS)
    ]
    text = str(sample.caption)
    return Caption(text, sample.objects, tuple(other for other in dict.fromkeys(others) if other != text))


def _with_truth(rewrite: Rewrite, caption: str) -> HallucinatedCaption:
    return replace(rewrite.hallucinated, truth="" if rewrite.truth == caption else rewrite.truth)


def _captions(units: Sequence[Unit], sources: Mapping[str, Source], share: int) -> Iterator[Caption]:
    """The captions of at most `share` rows of each unit."""
    for unit in progress(units, description="captions to learn from", unit="units"):
        if unit.cursor is None:
            continue
        source = sources[unit.source]
        numbered = enumerate(islice(source.rows(unit.cursor), min(share, unit.count)), unit.first)
        with ThreadPoolExecutor(_READS) as pool:
            for sample in map_ahead(pool, partial(_read, source), numbered, 4 * _READS):
                if isinstance(sample, Sample) and _wants_lies(sample):
                    yield _caption(sample)


def _read(source: Source, item: tuple[int, Any]) -> Sample | RejectedRow:
    number, row = item
    return source.read(row, number)
