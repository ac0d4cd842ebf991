"""How well a score finds what is false: ROC, thresholds, and whether risks made of it are true frequencies.

Scores are high for what is true. What is resampled are clusters, as in `statistics`.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

NUM_RESAMPLES = 1000
NUM_BINS = 10
# Keeps the slope finite where a score parts true and false without fault.
_RIDGE = 1e-3
_NEWTON_STEPS = 50


@dataclass(frozen=True)
class Scored:
    """Something that may be false: its score, whether it is, and the image that it is about."""

    score: float
    false: bool
    cluster: str


@dataclass(frozen=True)
class Area:
    """Area under the ROC curve with its 95 % interval: the chance that a false one scores below a true one."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Bin:
    """Items of similar risk: their mean risk, the share of them that is false, and how many they are."""

    risk: float
    share: float
    count: int


def area(items: Sequence[Scored], seed: int = 0) -> Area:
    """The area with its bootstrap interval; 0.5 within (0, 1) where all are true or all are false."""
    import numpy as np

    scores, false = _arrays(items)
    names, of_item = np.unique([item.cluster for item in items], return_inverse=True)
    if not false.any() or false.all():
        return Area(0.5, 0.0, 1.0)
    generator = np.random.default_rng(seed)
    found = []
    for _ in range(NUM_RESAMPLES):
        weights = np.bincount(generator.integers(len(names), size=len(names)), minlength=len(names))[of_item]
        if (value := _weighted_area(scores, false, weights)) is not None:
            found.append(value)
    low, high = np.quantile(found, [0.025, 0.975]) if found else (0.0, 1.0)
    return Area(_weighted_area(scores, false, np.ones(len(scores), dtype=int)) or 0.0, float(low), float(high))


def roc(items: Sequence[Scored]) -> list[tuple[float, float]]:
    """Points (share of the true that are marked, share of the false that are) from (0, 0) to (1, 1), one a score."""
    import numpy as np

    scores, false = _arrays(items)
    points = [(0.0, 0.0)]
    for threshold in np.unique(scores):
        marked = scores <= threshold
        points.append((float(marked[~false].mean()), float(marked[false].mean())))
    return points


def best_threshold(items: Sequence[Scored]) -> float:
    """The score below which to mark: where the share of the false that are marked exceeds that of the true most."""
    import numpy as np

    scores, false = _arrays(items)
    values = np.unique(scores)
    candidates = np.concatenate([(values[1:] + values[:-1]) / 2, [values[-1] + 1e-6]])
    gains = [(scores[false] < each).mean() - (scores[~false] < each).mean() for each in candidates]
    return float(candidates[int(np.argmax(gains))])


def fit_risk(items: Sequence[Scored]) -> tuple[float, float]:
    """Slope, at most 0, and intercept of the logistic regression of being false on the score."""
    import numpy as np

    scores, false = _arrays(items)
    center, spread = float(scores.mean()), float(scores.std()) or 1.0
    features = np.stack([(scores - center) / spread, np.ones(len(scores))], axis=1)
    base = float(np.clip(false.mean(), 1e-6, 1 - 1e-6))
    weights = np.array([0.0, np.log(base / (1 - base))])
    for _ in range(_NEWTON_STEPS):
        risks = 1 / (1 + np.exp(-np.clip(features @ weights, -500, 500)))
        gradient = features.T @ (risks - false) + _RIDGE * len(scores) * weights * (1, 0)
        curvature = (features * (risks * (1 - risks))[:, None]).T @ features
        curvature += np.diag([_RIDGE * len(scores), 1e-9])
        step = np.linalg.solve(curvature, gradient)
        weights = weights - step
        if float(np.abs(step).max()) < 1e-9:
            break
    if weights[0] > 0:  # the score points the wrong way: all that is known is how often things are false
        return 0.0, float(np.log(base / (1 - base)))
    return float(weights[0] / spread), float(weights[1] - weights[0] * center / spread)


def calibration(risks: Sequence[float], false: Sequence[bool]) -> tuple[float, list[Bin]]:
    """Expected calibration error, and its bins: as many items in each, equal risks in one as far as can be."""
    import numpy as np

    order = np.argsort(np.asarray(risks), kind="stable")
    ordered, happened = np.asarray(risks)[order], np.asarray(false, dtype=float)[order]
    edges = np.unique(np.searchsorted(ordered, [part[0] for part in np.array_split(ordered, NUM_BINS) if len(part)]))
    bins = [
        Bin(float(part.mean()), float(outcome.mean()), len(part))
        for part, outcome in zip(np.split(ordered, edges[1:]), np.split(happened, edges[1:]), strict=True)
        if len(part)
    ]
    return sum(each.count * abs(each.risk - each.share) for each in bins) / max(len(ordered), 1), bins


def _arrays(items: Sequence[Scored]) -> tuple[NDArray[np.float64], NDArray[np.bool_]]:
    import numpy as np

    return np.array([item.score for item in items]), np.array([item.false for item in items], dtype=bool)


def _weighted_area(scores: NDArray[np.float64], false: NDArray[np.bool_], weights: NDArray[Any]) -> float | None:
    """The chance that a false item, drawn by weight, scores below a true one; ties count half."""
    import numpy as np

    _, places = np.unique(scores, return_inverse=True)
    of_false = np.bincount(places, weights * false)
    of_true = np.bincount(places, weights * ~false)
    total = of_false.sum() * of_true.sum()
    if not total:
        return None
    above = of_true.sum() - np.cumsum(of_true)
    return float((of_false * (above + of_true / 2)).sum() / total)
