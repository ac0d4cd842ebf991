"""What goes into a generator and what comes out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from shellv_core.data.samples import HallucinatedCaption, SampleObject
from shellv_core.endpoint.asking import Usage


@dataclass(frozen=True)
class Caption:
    """A true caption and what else is known of its image.

    Attributes:
        text: The caption as its source has it.
        objects: What is in the image, where that is known; categories are COCO's names or other nouns.
        other_captions: More true captions of the same image.
    """

    text: str
    objects: tuple[SampleObject, ...] = ()
    other_captions: tuple[str, ...] = ()


@dataclass(frozen=True)
class Rewrite:
    """A lie and the true sentence that it is to be told from.

    Attributes:
        hallucinated: The lie; its `original` and `replacement` are the changed words of `truth` and of the lie.
        truth: A true caption in the lie's style: the source caption itself, or, where words were added, the caption
            extended or rephrased in the same way with what is true.
    """

    hallucinated: HallucinatedCaption
    truth: str


@dataclass(frozen=True)
class RewrittenCaption:
    """All rewrites of one caption, at most one of each type, in the order of the types asked for."""

    caption: Caption
    rewrites: tuple[Rewrite, ...]


@dataclass
class RewriteCounts(Usage):
    """What happened, for a manifest. All counts are of rewrites, except `captions` and the requests and tokens."""

    captions: int = 0
    kept: Counter[str] = field(default_factory=Counter)  # by type
    rejected: Counter[str] = field(default_factory=Counter)  # by "type: reason"
    missing: Counter[str] = field(default_factory=Counter)  # by "type: reason" where a caption stays without that type

    def add(self, other: RewriteCounts) -> None:
        """Add another worker's counts."""
        self.captions += other.captions
        for name in ("kept", "rejected", "missing", "requests"):
            getattr(self, name).update(getattr(other, name))
        self.input_tokens += other.input_tokens
        self.output_tokens += other.output_tokens
        self.cost += other.cost

    def to_record(self) -> dict[str, Any]:
        """A JSON-serialisable form, keys sorted."""
        record: dict[str, Any] = {"captions": self.captions}
        for name in ("kept", "rejected", "missing"):
            record[name] = dict(sorted(getattr(self, name).items()))
        return record | super().to_record()

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> RewriteCounts:
        """The inverse of `to_record`."""
        counters = {name: Counter(record[name]) for name in ("kept", "rejected", "missing", "requests")}
        return cls(
            captions=record["captions"],
            input_tokens=record["input_tokens"],
            output_tokens=record["output_tokens"],
            cost=record["cost"],
            **counters,
        )
