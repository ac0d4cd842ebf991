"""Ratings of models from votes between two of them.

A Bradley-Terry model: the probability that i is preferred to j is sigmoid(s_i - s_j). A tie, and "both bad", count as
half a win for each. Strengths are the maximum a posteriori under a weak normal prior, without which a model that never
lost would have none, and are shown on Elo's scale (400 points are odds of ten to one) around 1000. Intervals are
percentiles over bootstrap resamples of the votes, each with the prior's mean drawn from the prior: a plain bootstrap of
few votes, or of votes that all agree, has no spread and would pass for certainty.

Source: Bradley and Terry 1952; arXiv:2403.04132, section 4, for its use with anonymous battles; arXiv:2103.14445 for
the prior in a bootstrap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

Verdict = Literal["left", "right", "tie", "both_bad"]
VERDICTS: tuple[Verdict, ...] = ("left", "right", "tie", "both_bad")
LEFT_SCORE = {"left": 1.0, "right": 0.0, "tie": 0.5, "both_bad": 0.5}
POINTS = 400 / 2.302585092994046
MEAN = 1000.0
PRIOR_DEVIATION = 2.0
"""Of a strength, in nats: about 350 points."""
RESAMPLES = 200


@dataclass(frozen=True)
class Battle:
    """A vote between two models."""

    left: str
    right: str
    verdict: Verdict


@dataclass(frozen=True)
class Rating:
    """A model's rating with its 95 % interval, the votes that it was in, and its share of wins, ties as half."""

    model: str
    points: float
    low: float
    high: float
    votes: int
    win_share: float


def rate(battles: Sequence[Battle], resamples: int = RESAMPLES, seed: int = 0) -> list[Rating]:
    """The models' ratings, best first.

    Args:
        battles: votes; those of a model with itself say nothing and are left out.
        resamples: how many times the votes are drawn anew for the intervals.
        seed: of these draws.
    """
    import numpy as np

    battles = [battle for battle in battles if battle.left != battle.right]
    if not battles:
        return []
    models = sorted({name for battle in battles for name in (battle.left, battle.right)})
    place = {name: index for index, name in enumerate(models)}
    pairs_V2 = np.array([(place[battle.left], place[battle.right]) for battle in battles])
    scores_V = np.array([LEFT_SCORE[battle.verdict] for battle in battles])
    points = _points(pairs_V2, scores_V, np.zeros(len(models)))
    rng = np.random.default_rng(seed)
    drawn = []
    for _ in range(resamples):
        chosen = rng.integers(len(battles), size=len(battles))
        prior_M = rng.normal(0, PRIOR_DEVIATION, len(models))
        drawn.append(_points(pairs_V2[chosen], scores_V[chosen], prior_M))
    low, high = np.percentile(drawn, [2.5, 97.5], axis=0)
    ratings = []
    for name, index in place.items():
        is_left, is_right = pairs_V2[:, 0] == index, pairs_V2[:, 1] == index
        votes = int(is_left.sum() + is_right.sum())
        wins = float(scores_V[is_left].sum() + (1 - scores_V[is_right]).sum())
        ratings.append(Rating(name, float(points[index]), float(low[index]), float(high[index]), votes, wins / votes))
    return sorted(ratings, key=lambda rating: -rating.points)


def _points(pairs_V2: NDArray[Any], scores_V: NDArray[Any], prior_M: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ratings of M models from V votes, by a prior with the means `prior_M`."""
    import numpy as np
    from scipy.optimize import minimize
    from scipy.special import expit

    # wins_MM[i, j]: how often i was preferred to j.
    wins_MM = np.zeros((len(prior_M), len(prior_M)))
    np.add.at(wins_MM, (pairs_V2[:, 0], pairs_V2[:, 1]), scores_V)
    np.add.at(wins_MM, (pairs_V2[:, 1], pairs_V2[:, 0]), 1 - scores_V)

    def loss(strengths_M: NDArray[Any]) -> tuple[float, NDArray[Any]]:
        margins_MM = strengths_M[:, None] - strengths_M[None, :]
        surprise_MM = wins_MM * expit(-margins_MM)
        away_M = (strengths_M - prior_M) / PRIOR_DEVIATION**2
        value = (wins_MM * np.logaddexp(0, -margins_MM)).sum() + (away_M * (strengths_M - prior_M)).sum() / 2
        return float(value), surprise_MM.sum(0) - surprise_MM.sum(1) + away_M

    strengths_M = minimize(loss, prior_M, jac=True, method="L-BFGS-B").x
    points: NDArray[np.float64] = MEAN + POINTS * (strengths_M - strengths_M.mean())
    return points
