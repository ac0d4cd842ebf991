"""Whether a candidate becomes the champion: a pure decision over two sets of metrics and a file of thresholds.

Knows nothing of MLflow, of models or of how the metrics came about. Metrics have flat names such as
``pope_random_accuracy``; ``blind_`` in front names the same of the run with shuffled pictures.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Literal, Protocol

from pydantic import Field, model_validator

from shellv_core.config import Config, build_config, nearest
from shellv_core.errors import ConfigError, PromotionError

Metrics = Mapping[str, float]

LOWER_IS_BETTER = (
    "_instance_rate",
    "_sentence_rate",
    "_hallucination_rate",
    "_chair",
    "_hal",
    "_cog",
    "_unparsed_share",
    "_num_unparsed",
    "_num_missing",
)
BLIND_PREFIX = "blind_"
ALL = "all"


class Paired(Protocol):
    """Candidate minus champion on the same questions, its 95 % interval and two-sided p-value."""

    @property
    def difference(self) -> float:
        """Candidate minus champion."""

    @property
    def low(self) -> float:
        """Lower end of the interval."""

    @property
    def high(self) -> float:
        """Upper end of the interval."""

    @property
    def p_value(self) -> float:
        """Two-sided, not adjusted."""


class Thresholds(Config):
    """What a candidate must show; empty sections ask for nothing. The first four map metric names to numbers.

    Attributes:
        minimum: the candidate's metric is at least this.
        maximum: the candidate's metric is at most this.
        gain_over_blind: the metric is better than that of its own run with shuffled pictures by at least this.
        not_worse_than_champion: the margin by which the metric may be worse than the champion's. Where both were asked
            the same questions, the whole paired interval must lie within it; else the two values must.
        require_gain: metrics that must each be significantly better than the champion's, on the same questions.
        no_loss: metrics none of which may be significantly worse than the champion's, or ``all`` that both have.
        alpha: significance of `require_gain` and of `no_loss`; each list is tested at this level as a whole, by Holm's
            method.
    """

    minimum: dict[str, float] = Field(default_factory=dict)
    maximum: dict[str, float] = Field(default_factory=dict)
    gain_over_blind: dict[str, float] = Field(default_factory=dict)
    not_worse_than_champion: dict[str, float] = Field(default_factory=dict)
    require_gain: tuple[str, ...] = ()
    no_loss: Literal["all"] | tuple[str, ...] = ()
    alpha: float = Field(default=0.05, gt=0.0, lt=1.0)

    def metrics(self) -> list[str]:
        """The metrics that the rules name, without ``all``."""
        sections = (self.minimum, self.maximum, self.gain_over_blind, self.not_worse_than_champion, self.require_gain)
        losses = () if self.no_loss == ALL else self.no_loss
        return list(dict.fromkeys([*(name for section in sections for name in section), *losses]))

    @model_validator(mode="after")
    def _check(self) -> Thresholds:
        if not any(getattr(self, section) for section in type(self).model_fields if section != "alpha"):
            raise ValueError("no rule is given, so every candidate would pass; state at least one metric")
        negative = [name for name, margin in self.not_worse_than_champion.items() if margin < 0]
        if negative:
            raise ValueError(f"not_worse_than_champion.{negative[0]} must not be negative")
        return self


@dataclass(frozen=True)
class Check:
    """One rule applied: whether it holds, and a sentence with the numbers."""

    passed: bool
    reason: str


@dataclass(frozen=True)
class Verdict:
    """The decision and what it rests on, one check for each rule."""

    promoted: bool
    checks: tuple[Check, ...] = field(default=())

    @property
    def reasons(self) -> list[str]:
        """All sentences, those of failed rules first."""
        return [check.reason for check in sorted(self.checks, key=lambda check: check.passed)]


def read_thresholds(content: str, source: str) -> Thresholds:
    """Parse a thresholds file (YAML).

    Raises:
        PromotionError: if it is not YAML, or holds an unknown section or no number where one is needed.
    """
    import yaml

    try:
        values = yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise PromotionError(f"the thresholds file {source} is not valid YAML: {error}") from None
    if not isinstance(values, dict):
        raise PromotionError(
            f"the thresholds file {source} holds {type(values).__name__}; a mapping with the sections"
            f" {', '.join(Thresholds.model_fields)} is expected."
        )
    try:
        return build_config(Thresholds, {key: value for key, value in values.items() if value is not None})
    except ConfigError as error:
        raise PromotionError(f"the thresholds file {source}: {error}") from None


def decide(
    candidate: Metrics,
    champion: Metrics | None,
    thresholds: Thresholds,
    paired: Mapping[str, Paired] | None = None,
) -> Verdict:
    """Apply every rule; the candidate is promoted if all hold.

    Args:
        candidate: its metrics, those of its blind run included.
        champion: the champion's metrics, None where there is no champion yet (its rules then hold).
        paired: metric -> comparison of candidate and champion, where they were asked the same questions.

    Raises:
        PromotionError: if a rule names a metric that is not there, with the nearest name.
    """
    _check_names(candidate, champion, thresholds)
    checks = [
        Check(candidate[name] >= bound, f"{name} is {candidate[name]:.4f}, at least {bound:g} is needed")
        for name, bound in thresholds.minimum.items()
    ]
    checks += [
        Check(candidate[name] <= bound, f"{name} is {candidate[name]:.4f}, at most {bound:g} is allowed")
        for name, bound in thresholds.maximum.items()
    ]
    checks += [_against_blind(candidate, name, gain) for name, gain in thresholds.gain_over_blind.items()]
    if champion is not None:
        paired = paired or {}
        checks += [
            _against_champion(candidate[name], champion[name], name, margin, paired.get(name))
            for name, margin in thresholds.not_worse_than_champion.items()
        ]
        checks += _gains(paired, thresholds.require_gain, thresholds.alpha)
        checks += _losses(paired, thresholds.no_loss, thresholds.alpha)
    elif thresholds.not_worse_than_champion or thresholds.require_gain or thresholds.no_loss:
        checks.append(Check(True, "there is no champion to compare with"))
    return Verdict(all(check.passed for check in checks), tuple(checks))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """P-values adjusted by Holm's method: to call those below alpha significant makes any false claim among all of them
    less likely than alpha."""
    adjusted: dict[str, float] = {}
    highest = 0.0
    for place, name in enumerate(sorted(p_values, key=lambda name: p_values[name])):
        highest = max(highest, min(1.0, (len(p_values) - place) * p_values[name]))
        adjusted[name] = highest
    return {name: adjusted[name] for name in p_values}


def lower_is_better(name: str) -> bool:
    """Whether a smaller value of the metric is the better one."""
    return name.endswith(LOWER_IS_BETTER)


def _against_blind(candidate: Metrics, name: str, gain: float) -> Check:
    value, blind = candidate[name], candidate[BLIND_PREFIX + name]
    gained = blind - value if lower_is_better(name) else value - blind
    return Check(
        gained >= gain,
        f"{name} is {value:.4f}, {blind:.4f} with shuffled pictures: gain {gained:+.4f}, at least {gain:+g} is needed",
    )


def _against_champion(value: float, other: float, name: str, margin: float, paired: Paired | None) -> Check:
    sign = -1.0 if lower_is_better(name) else 1.0
    if paired is None:
        gain, how = sign * (value - other), "on other questions, unpaired"
    else:
        gain = min(sign * bound for bound in (paired.low, paired.high))
        how = "worst end of the 95 % interval on the same questions"
    return Check(
        gain >= -margin,
        f"{name} is {value:.4f}, the champion's {other:.4f}: gain {gain:+.4f} ({how}), at least {-margin:+g} is needed",
    )


def _gains(paired: Mapping[str, Paired], names: Iterable[str], alpha: float) -> list[Check]:
    """One check for each metric that must be better: each is a claim of its own, so that they are adjusted together."""
    adjusted = holm({name: paired[name].p_value for name in names if name in paired})
    return [
        Check(
            gain_of(name, paired[name]) > 0 and adjusted[name] <= alpha,
            f"{_told(name, paired[name], adjusted[name])}; a significant gain (at most {alpha:g}) is needed",
        )
        if name in paired
        else _untested(name, "gain")
        for name in names
    ]


def _losses(paired: Mapping[str, Paired], names: str | Iterable[str], alpha: float) -> list[Check]:
    """One check for each metric that must not be worse."""
    if names == ALL:
        if not paired:
            return [_untested("no metric", "loss")]
        names = tuple(paired)
    names = tuple(names)
    adjusted = holm({name: paired[name].p_value for name in names if name in paired})
    return [
        Check(
            gain_of(name, paired[name]) >= 0 or adjusted[name] > alpha,
            f"{_told(name, paired[name], adjusted[name])}; no significant loss (at most {alpha:g}) is allowed",
        )
        if name in paired
        else _untested(name, "loss")
        for name in names
    ]


def gain_of(name: str, paired: Paired) -> float:
    """The difference, positive where the first is the better one."""
    return -paired.difference if lower_is_better(name) else paired.difference


def _told(name: str, paired: Paired, adjusted: float) -> str:
    return (
        f"{name}: gain {gain_of(name, paired):+.4f} over the champion on the same questions,"
        f" p = {paired.p_value:.2g}, {adjusted:.2g} by Holm's method"
    )


def _untested(name: str, what: str) -> Check:
    return Check(
        False,
        f"{name}: the champion was not asked the same questions, so that a {what} cannot be tested; evaluate it again"
        " on the candidate's data and benchmarks",
    )


def _check_names(candidate: Metrics, champion: Metrics | None, thresholds: Thresholds) -> None:
    for name in [*thresholds.metrics(), *(BLIND_PREFIX + name for name in thresholds.gain_over_blind)]:
        if name not in candidate:
            raise PromotionError(
                f"the thresholds name {name!r}, which the evaluation lacks; {nearest(name, candidate)}"
            )
    for name in thresholds.not_worse_than_champion:
        if champion is not None and name not in champion:
            raise PromotionError(
                f"the champion's evaluation lacks {name!r}; {nearest(name, champion)}. Evaluate the champion again with"
                " these benchmarks, or drop the rule from not_worse_than_champion."
            )
