"""Intervals and paired tests over outcomes (events, trials); see `benchmark.Outcomes`.

What is resampled and what is tested are clusters: the questions about one image together. A model that misreads an
image errs in several of its questions at once, so that they say less than as many questions about as many images; to
resample questions would make intervals too narrow. Where every question has its own image, clusters are questions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Outcomes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NUM_RESAMPLES = 2000

Clusters = Mapping[str, str]
"""Question -> its cluster, the image; a question that is not in it is its own cluster."""


@dataclass(frozen=True)
class PairedComparison:
    """Two models on the same questions.

    Attributes:
        difference: share of the first minus share of the second.
        low, high: its 95 % interval by paired bootstrap over clusters.
        p_value: two-sided; see `test`.
        test: ``mcnemar`` (exact, by cluster; see `mcnemar`) where each question has one trial, else ``bootstrap``.
        num_pairs: questions that both have.
        num_clusters: images that they are about.
        only_first, only_second: questions whose event happened with one model alone.
    """

    difference: float
    low: float
    high: float
    p_value: float
    test: str
    num_pairs: int
    num_clusters: int
    only_first: int
    only_second: int


def bootstrap_interval(
    outcomes: Outcomes, clusters: Clusters | None = None, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float]:
    """Percentile bootstrap interval of a share, clusters resampled; (0, 1) without trials."""
    if not any(trials for _, trials in outcomes.values()):
        return 0.0, 1.0
    shares = _resampled_shares(_by_cluster([outcomes], list(outcomes), clusters or {}), seed)[0]
    return _quantiles(shares, confidence)


def mcnemar(differences: Iterable[int]) -> float:
    """Exact two-sided McNemar test of paired yes/no outcomes, by cluster.

    If the models are alike, a cluster's difference is as likely to be the other way round. The p-value is the chance
    that the sum of all, each with a random sign, is at least as far from 0 as it is. With differences of 1 and -1, one
    question in each cluster, this is McNemar's test by the binomial distribution.

    Args:
        differences: for each cluster, how many more events the first model has than the second.
    """
    import numpy as np
    from scipy.stats import binom

    values = [value for value in differences if value]
    observed = abs(sum(values))
    # Chance of each sum from -total to total.
    chances = np.ones(1)
    for size, count in Counter(map(abs, values)).items():
        signs = np.zeros(2 * size * count + 1)
        signs[:: 2 * size] = binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, signs)
    total = len(chances) // 2
    tail = float(chances[: total - observed + 1].sum())
    return min(1.0, 2 * tail) if observed else 1.0


def compare_paired(
    first: Outcomes,
    second: Outcomes,
    clusters: Clusters | None = None,
    confidence: float = 0.95,
    seed: int = 0,
) -> PairedComparison:
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
    pairs = _by_cluster([first, second], keys, clusters or {})
    shares = _resampled_shares(pairs, seed)
    resampled = shares[0] - shares[1]
    low, high = _quantiles(resampled, confidence)
    totals = pairs.sum(axis=1)
    share = totals[:, 0] / np.maximum(totals[:, 1], 1)
    if all(first[key][1] == second[key][1] == 1 for key in keys):
        test, p_value = "mcnemar", mcnemar((pairs[0, :, 0] - pairs[1, :, 0]).astype(int).tolist())
    else:
        test, p_value = "bootstrap", _bootstrap_p_value(resampled, pairs.shape[1])
    return PairedComparison(
        difference=float(share[0] - share[1]),
        low=low,
        high=high,
        p_value=p_value,
        test=test,
        num_pairs=len(keys),
        num_clusters=pairs.shape[1],
        only_first=sum(first[key][0] > 0 and second[key][0] == 0 for key in keys),
        only_second=sum(first[key][0] == 0 and second[key][0] > 0 for key in keys),
    )


def _bootstrap_p_value(differences: NDArray[np.float64], num_clusters: int) -> float:
    """Twice the share of resamples on the other side of 0.

    It is never 0, as no number of resamples shows that, and never below the smallest p-value of a sign test: a few
    clusters that happen to agree resample to nothing else.
    """
    below, above = int((differences <= 0).sum()), int((differences >= 0).sum())
    p_value = 2 * (1 + min(below, above)) / (1 + len(differences))
    return min(1.0, max(p_value, 2.0 ** (1 - num_clusters)))


def _quantiles(values: NDArray[np.float64], confidence: float) -> tuple[float, float]:
    import numpy as np

    tail = (1 - confidence) / 2
    low, high = np.quantile(values, [tail, 1 - tail])
    return float(low), float(high)


def _by_cluster(models: Sequence[Outcomes], keys: Sequence[str], clusters: Clusters) -> NDArray[np.float64]:
    """Sums of events and trials [models, clusters, 2], clusters in the order of their first question."""
    import numpy as np

    places: dict[str, int] = {}
    # A question's id may be another's image.
    of_key = [
        places.setdefault(f"image {clusters[key]}" if key in clusters else f"question {key}", len(places))
        for key in keys
    ]
    sums = np.zeros((len(models), len(places), 2))
    for row, outcomes in zip(sums, models, strict=True):
        np.add.at(row, of_key, np.asarray([outcomes[key] for key in keys], dtype=np.float64))
    return sums


def _resampled_shares(outcomes: NDArray[np.float64], seed: int) -> NDArray[np.float64]:
    """Shares [models, resamples] of `outcomes` [models, clusters, 2], all models resampled alike."""
    import numpy as np

    count = outcomes.shape[1]
    generator = np.random.default_rng(seed)
    totals = np.empty((outcomes.shape[0], NUM_RESAMPLES, 2))
    for resample in range(NUM_RESAMPLES):
        totals[:, resample] = outcomes[:, generator.integers(count, size=count)].sum(axis=1)
    events, trials = totals[..., 0], totals[..., 1]
    # Without any trial the share is 0, as in the benchmarks' own scores.
    return np.divide(events, trials, out=np.zeros_like(events), where=trials > 0)
