"""The offline generator: rules propose, the balance chooses, the filter rejects."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from shellv_core.config import canonical_json, fingerprint
from shellv_core.data.hallucination.balance import Proposals, choose, fit_potentials
from shellv_core.data.hallucination.captions import Caption, Rewrite, RewriteCounts, RewrittenCaption
from shellv_core.data.hallucination.config import HallucinationConfig, RewriteType
from shellv_core.data.hallucination.filtering import reject_reason
from shellv_core.data.hallucination.grammar import Parser
from shellv_core.data.hallucination.parsed import ParsedCaption
from shellv_core.data.hallucination.rules import Candidate, Rules
from shellv_core.data.hallucination.statistics import CorpusStatistics
from shellv_core.data.samples import HallucinatedCaption
from shellv_core.errors import DataError
from shellv_core.progress import Progress

_FORMAT = 1
_MAX_ATTEMPTS = 6  # candidates tried for one caption and type
_CHUNK = 1024  # captions held parsed at once


@dataclass(frozen=True)
class RewriterState:
    """What the rules learnt from a sample of captions: the corpus's counts and the balance of each type."""

    statistics: CorpusStatistics
    potentials: dict[str, dict[int, float]]
    settings: str  # fingerprint of the settings that it was learnt with
    complete: bool  # whether the sample is all captions that there are

    def to_json(self) -> bytes:
        """Canonical JSON: equal states give equal bytes."""
        return canonical_json(
            {
                "format": _FORMAT,
                "settings": self.settings,
                "complete": self.complete,
                "statistics": self.statistics.to_record(),
                "potentials": {
                    kind: {str(name): value for name, value in sorted(values.items())}
                    for kind, values in self.potentials.items()
                },
            }
        )

    @classmethod
    def from_json(cls, data: bytes) -> RewriterState:
        """The inverse of `to_json`.

        Raises:
            DataError: if `data` is no such state.
        """
        try:
            record = json.loads(data)
            if record["format"] != _FORMAT:
                raise DataError(f"the rewriter state has format {record['format']!r}; this version reads {_FORMAT}.")
            potentials = {
                kind: {int(name): float(value) for name, value in values.items()}
                for kind, values in record["potentials"].items()
            }
            statistics = CorpusStatistics.from_record(record["statistics"])
            return cls(statistics, potentials, record["settings"], record["complete"])
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"this is no state of the caption rewriter ({error!r}); fit it again.") from None


class RuleGenerator:
    """Rewrites captions by rules; the result depends on the captions of a call, the state and the config alone."""

    def __init__(self, config: HallucinationConfig) -> None:
        self._config = config
        self._parser = Parser(config.rules.batch_size)

    def fit(self, captions: Iterable[Caption], complete: bool = False) -> RewriterState:
        """Learn from the first `rules.num_fit_captions` captions; deterministic.

        Args:
            complete: whether these are all captions that will be rewritten.

        Raises:
            DataError: if there are no captions.
        """
        sample = list(islice(captions, self._config.rules.num_fit_captions))
        if not sample:
            raise DataError("there is no caption to learn from; give at least a few hundred.")
        with Progress(len(sample) * (1 + len(self._config.types)), "learn the corpus", "captions") as progress:
            parsed = []
            for caption in self._parsed(sample):
                parsed.append(caption)
                progress.update()
            statistics = CorpusStatistics.of(parsed)
            rules = self._rules(statistics)
            potentials: dict[str, dict[int, float]] = {}
            for kind in self._config.types:
                proposals = []
                for caption in parsed:
                    proposals.append(Proposals.of(rules.propose(caption, kind)))
                    progress.update()
                potentials[kind] = fit_potentials(
                    proposals, self._config.rules.num_rounds, self._config.rules.regularization
                )
        return RewriterState(statistics, potentials, self._settings(), complete)

    def read_state(self, data: bytes) -> RewriterState:
        """Read what `RewriterState.to_json` wrote.

        Raises:
            DataError: if it is no state, or was learnt with other settings or another parser than this generator's.
        """
        state = RewriterState.from_json(data)
        if state.settings != self._settings():
            raise DataError(
                "the rewriter state was learnt with other settings or another parser than these; fit it again."
            )
        return state

    def rewrite(
        self, captions: Iterable[Caption], state: RewriterState, counts: RewriteCounts
    ) -> Iterator[RewrittenCaption]:
        """Yield each caption with its rewrites, in order; `counts` is added to.

        Where the state has not seen all captions, those of a call are balanced together, 1,024 at a time.
        """
        rules = self._rules(state.statistics)
        iterator = iter(captions)
        while chunk := list(islice(iterator, _CHUNK)):
            yield from self._rewrite_chunk(rules, state, chunk, counts)

    def _rewrite_chunk(
        self, rules: Rules, state: RewriterState, chunk: Sequence[Caption], counts: RewriteCounts
    ) -> Iterator[RewrittenCaption]:
        parsed = list(self._parsed(chunk))
        slots: list[_Slot] = []
        settings = self._config.rules
        num_rounds = 0 if state.complete else settings.num_batch_rounds
        for kind in self._config.types:
            proposals = [Proposals.of(rules.propose(caption, kind)) for caption in parsed]
            potentials = fit_potentials(proposals, num_rounds, settings.regularization, state.potentials.get(kind, {}))
            for index, (caption, proposed) in enumerate(zip(parsed, proposals, strict=True)):
                chosen = choose(proposed, potentials, self._config.seed, f"{kind}\0{caption.text}")
                slots.append(_Slot(index, kind, chosen[:_MAX_ATTEMPTS]))
        slots.sort(key=lambda slot: slot.index)
        open_slots = [slot for slot in slots if slot.candidates]
        taken: list[set[str]] = [set() for _ in chunk]
        # Relations have the fewest proposals, so they choose before the others.
        open_slots.sort(key=lambda slot: slot.kind != "relation")
        while open_slots:
            self._try_next(parsed, open_slots, taken, counts)
            open_slots = [slot for slot in open_slots if slot.taken is None and slot.candidates]
        rewrites: list[list[Rewrite]] = [[] for _ in chunk]
        for slot in slots:
            if slot.taken is None:
                reason = "no candidate" if not slot.tried else "all candidates rejected"
                counts.missing[f"{slot.kind}: {reason}"] += 1
            else:
                counts.kept[slot.kind] += 1
                rewrites[slot.index].append(slot.taken)
        counts.captions += len(chunk)
        for source, found in zip(chunk, rewrites, strict=True):
            yield RewrittenCaption(source, tuple(found))

    def _try_next(
        self, parsed: list[ParsedCaption], slots: list[_Slot], taken: list[set[str]], counts: RewriteCounts
    ) -> None:
        proposals = [slot.next_rewrite(parsed[slot.index]) for slot in slots]
        docs: list[tuple[Any, Any]] = [(None, None)] * len(slots)
        if self._config.rules.reparse:
            lies = self._parser.parse(proposal.hallucinated.text.strip() for proposal in proposals)
            docs = [(parsed[slot.index].doc, lie) for slot, lie in zip(slots, lies, strict=True)]
            extended = [
                index for index, slot in enumerate(slots) if proposals[index].truth != parsed[slot.index].caption.text
            ]
            truths = self._parser.parse(proposals[index].truth.strip() for index in extended)
            for index, truth in zip(extended, truths, strict=True):
                docs[index] = (truth, docs[index][1])
        for slot, proposal, (truth, lie) in zip(slots, proposals, docs, strict=True):
            caption = parsed[slot.index].caption
            reason = reject_reason(caption, proposal, self._config.filter, truth, lie)
            if reason is None and proposal.hallucinated.text in taken[slot.index]:
                reason = "same as another type's"
            if reason is None:
                slot.taken = proposal
                taken[slot.index].add(proposal.hallucinated.text)
            else:
                counts.rejected[f"{slot.kind}: {reason}"] += 1

    def _parsed(self, captions: Sequence[Caption]) -> Iterator[ParsedCaption]:
        texts = [text.strip() for caption in captions for text in (caption.text, *caption.other_captions)]
        docs = self._parser.parse(texts)
        for caption in captions:
            doc = next(docs)
            others = tuple(ParsedCaption(Caption(text), next(docs)) for text in caption.other_captions)
            yield ParsedCaption(caption, doc, others)

    def _rules(self, statistics: CorpusStatistics) -> Rules:
        return Rules(statistics, self._config.rules.num_candidates, self._config.seed)

    def _settings(self) -> str:
        learnt = self._config.rules.model_dump(exclude={"batch_size", "reparse"})
        return fingerprint(learnt, self._config.seed, list(self._config.types), self._parser.model)


@dataclass
class _Slot:
    """One caption's place for a lie of one type."""

    index: int
    kind: RewriteType
    candidates: list[Candidate]
    taken: Rewrite | None = None
    tried: int = 0

    def next_rewrite(self, caption: ParsedCaption) -> Rewrite:
        candidate = self.candidates.pop(0)
        self.tried += 1
        source = caption.caption.text
        lead = source[: len(source) - len(source.lstrip())]
        tail = source[len(source.rstrip()) :]
        return Rewrite(
            HallucinatedCaption(self.kind, lead + candidate.text + tail, candidate.original, candidate.replacement),
            lead + candidate.truth + tail,
        )
