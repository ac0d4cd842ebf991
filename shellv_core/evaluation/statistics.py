"""Intervals and paired tests over outcomes (events, trials); see `benchmark.Outcomes`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Outcomes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NUM_RESAMPLES = 2000


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same questions.

    Attributes:
        difference: share of the first minus share of the second.
        low, high: its 95 % interval by paired bootstrap.
        p_value: McNemar's exact test where each question has one trial, else the two-sided bootstrap p-value.
        only_first, only_second: questions whose event happened with one model alone (single trials only).
    """

    difference: float
    low: float
    high: float
    p_value: float
    num_pairs: int
    only_first: int
    only_second: int


def bootstrap_interval(
    outcomes: Sequence[tuple[int, int]], confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a share; (0, 1) without trials."""
    import numpy as np

    if not outcomes or not any(trials for _, trials in outcomes):
        return 0.0, 1.0
    shares = _resampled_shares(np.asarray(outcomes, dtype=np.float64)[None], seed)[0]
    tail = (1 - confidence) / 2
    low, high = np.quantile(shares, [tail, 1 - tail])
    return float(low), float(high)


def mcnemar(only_first: int, only_second: int) -> float:
    """Exact two-sided McNemar p-value from the two discordant counts."""
    from scipy.stats import binomtest

    discordant = only_first + only_second
    return float(binomtest(only_first, discordant, 0.5).pvalue) if discordant else 1.0


def compare_paired(first: Outcomes, second: Outcomes, confidence: float = 0.95, seed: int = 0) -> PairedComparison:
    """Compare two models' outcomes on the questions that both have.

    Raises:
        EvaluationError: if they share no question.
    """
    import numpy as np

    keys = [key for key in first if key in second]
    if not keys:
        raise EvaluationError(
            f"the two sets of outcomes ({len(first)} and {len(second)}) share no question; a paired comparison needs"
            " answers to the same questions."
        )
    pairs = np.asarray([[first[key] for key in keys], [second[key] for key in keys]], dtype=np.float64)
    shares = _resampled_shares(pairs, seed)
    resampled = shares[0] - shares[1]
    tail = (1 - confidence) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail])
    events, trials = pairs[..., 0], pairs[..., 1]
    total = events.sum(axis=1) / np.maximum(trials.sum(axis=1), 1)
    only_first = int(((events[0] > 0) & (events[1] == 0)).sum())
    only_second = int(((events[0] == 0) & (events[1] > 0)).sum())
    if (trials == 1).all():
        p_value = mcnemar(only_first, only_second)
    else:
        below, above = float(np.mean(resampled <= 0)), float(np.mean(resampled >= 0))
        p_value = min(1.0, 2 * min(below, above))
    return PairedComparison(
        difference=float(total[0] - total[1]),
        low=float(low),
        high=float(high),
        p_value=p_value,
        num_pairs=len(keys),
        only_first=only_first,
        only_second=only_second,
    )


def _resampled_shares(outcomes: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Shares [models, resamples] of `outcomes` [models, items, 2], all models resampled alike."""
    import numpy as np

    count = outcomes.shape[1]
    generator = np.random.default_rng(seed)
    totals = np.empty((outcomes.shape[0], NUM_RESAMPLES, 2))
    for resample in range(NUM_RESAMPLES):
        totals[:, resample] = outcomes[:, generator.integers(count, size=count)].sum(axis=1)
    events, trials = totals[..., 0], totals[..., 1]
    # Without any trial the share is 0, as in the benchmarks' own scores.
    return np.divide(events, trials, out=np.zeros_like(events), where=trials > 0)
