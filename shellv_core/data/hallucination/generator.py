"""The entry point: one interface over the rule, language-model and endpoint generators.

    generator = build_generator(config)
    state = generator.fit(captions)                 # once; bytes, to be stored beside the plan
    for item in generator.rewrite(captions, state, counts): ...   # in any number of workers

`rewrite` of the rules is a pure function of the captions given together, what is known of their images, the state and
the config, so workers that share a state write the same lies for the same unit of a data set.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Protocol

from shellv_core.data.hallucination.captions import Caption, RewriteCounts, RewrittenCaption
from shellv_core.data.hallucination.config import HallucinationConfig
from shellv_core.data.hallucination.language_model import LanguageModelGenerator
from shellv_core.data.hallucination.measurement import measure, pairs_by_type
from shellv_core.data.hallucination.rule_generator import RuleGenerator
from shellv_core.errors import DataError


class CaptionRewriter(Protocol):
    """Makes hallucinated captions."""

    def fit(self, captions: Iterable[Caption], complete: bool = False) -> bytes:
        """Learn what `rewrite` needs from a sample of the corpus; JSON, b"" where nothing is learnt.

        Args:
            complete: whether these are all captions that will be rewritten.
        """
        ...

    def rewrite(self, captions: Iterable[Caption], state: bytes, counts: RewriteCounts) -> Iterator[RewrittenCaption]:
        """Yield each caption with its rewrites, in order; `counts` is added to."""
        ...


def build_generator(config: HallucinationConfig) -> CaptionRewriter:
    """The generator that `config` names.

    Raises:
        ConfigError: if no English model for spaCy is installed, or the endpoint's settings are incomplete.
        IntegrityError: if the installed model is not the published one.
        ModelError: if the local language model cannot be read.
    """
    if config.generator == "rules":
        return _Rules(config)
    if config.generator == "transformers":
        from shellv_core.data.hallucination.local_model import LocalModel

        return _Asked(LanguageModelGenerator(config, LocalModel(config.transformers)))
    from shellv_core.data.hallucination.endpoint import EndpointAnswerer

    return _Asked(LanguageModelGenerator(config, EndpointAnswerer(config.endpoint)))


def quality_record(
    captions: list[RewrittenCaption], counts: RewriteCounts, config: HallucinationConfig
) -> dict[str, Any]:
    """What a manifest keeps: the counts, and how well text alone tells the lies of each type from the truths.

    Raises:
        DataError: if a type has too few lies to measure.
    """
    accuracies = measure(pairs_by_type(captions), config.seed)
    record: dict[str, Any] = counts.to_record() | {"text_only_pair_accuracy": {}}
    for kind, accuracy in accuracies.items():
        limit = config.max_event_pair_accuracy if kind == "event" else config.max_pair_accuracy
        record["text_only_pair_accuracy"][kind] = {
            "value": round(accuracy.value, 4),
            "low": round(accuracy.low, 4),
            "high": round(accuracy.high, 4),
            "pairs": accuracy.num_pairs,
            "limit": limit,
            "within_limit": accuracy.value <= limit,
        }
    return record


class _Rules:
    def __init__(self, config: HallucinationConfig) -> None:
        self._generator = RuleGenerator(config)
        self._read: tuple[bytes, Any] = (b"", None)

    def fit(self, captions: Iterable[Caption], complete: bool = False) -> bytes:
        return self._generator.fit(captions, complete).to_json()

    def rewrite(self, captions: Iterable[Caption], state: bytes, counts: RewriteCounts) -> Iterator[RewrittenCaption]:
        if self._read[0] != state or not state:
            self._read = (state, self._generator.read_state(state))
        return self._generator.rewrite(captions, self._read[1], counts)


class _Asked:
    def __init__(self, generator: LanguageModelGenerator) -> None:
        self._generator = generator

    def fit(self, captions: Iterable[Caption], complete: bool = False) -> bytes:
        return b""

    def rewrite(self, captions: Iterable[Caption], state: bytes, counts: RewriteCounts) -> Iterator[RewrittenCaption]:
        if state:
            raise DataError("a rewriter state was given, but only the rules learn one; leave it empty.")
        return self._generator.rewrite(captions, counts)
