"""Adversarial balance: which of the proposals is taken, so that text alone does not give the lies away.

A linear classifier of truths and lies learns from the mean difference of their features. The choice among a caption's
proposals is a distribution with one potential per feature (words, word pairs and lengths that the lie adds or loses
against its truth),

    p(proposal) ~ exp(log_weight - sum of potential[f] * difference[f]),

and the potentials are found such that the expected difference of every feature vanishes: the maximum-entropy
distribution nearest to the plain weights under which such a classifier finds nothing. Its dual is convex; each step
follows the gradient, which is what the classifier would learn from the lies of the step before.
"""

from __future__ import annotations

import hashlib
import math
import re
import zlib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from shellv_core.data.hallucination.rules import Candidate

_BITS = 18
_WORD = re.compile(r"\w+|[^\w\s]")
_RATE = 0.5
_DIGITS = 3
_MIN_POTENTIAL = 0.02
_MIN_CAPTIONS = 5  # rarer features say more of the sample than of the corpus


def differences(truth: str, lie: str) -> dict[int, float]:
    """Hashed features that the lie has more (+) or less (-) often than its truth; features in both alike are absent."""
    first = ["^", *_WORD.findall(truth.lower()), "$"]
    second = ["^", *_WORD.findall(lie.lower()), "$"]
    start = 0
    while start < min(len(first), len(second)) and first[start] == second[start]:
        start += 1
    end = 0
    while end < min(len(first), len(second)) - start and first[-1 - end] == second[-1 - end]:
        end += 1
    counts: defaultdict[str, float] = defaultdict(float)
    for words, sign in ((second, 1), (first, -1)):
        window = words[max(start - 1, 0) : len(words) - end + 1]
        for word in window:
            counts[word] += sign
            counts["#" + word[-2:]] += sign
        for pair in pairwise(window):
            counts[" ".join(pair)] += sign
    counts["\0words"] = len(second) - len(first)
    counts["\0letters"] = (len(lie) - len(truth)) / 5
    return {zlib.crc32(name.encode()) >> (32 - _BITS): float(count) for name, count in counts.items() if count}


@dataclass(frozen=True)
class Proposals:
    """What one caption could become, with the features that each lie adds to or takes from its truth."""

    candidates: Sequence[Candidate]
    differences: Sequence[Mapping[int, float]]

    @classmethod
    def of(cls, candidates: Sequence[Candidate]) -> Proposals:
        """Return `candidates` with their features."""
        return cls(candidates, [differences(each.truth, each.text) for each in candidates])

    def scores(self, potentials: Mapping[int, float]) -> list[float]:
        """The log-weights under `potentials`."""
        return [
            candidate.log_weight - sum(potentials.get(name, 0.0) * value for name, value in found.items())
            for candidate, found in zip(self.candidates, self.differences, strict=True)
        ]


def choose(proposals: Proposals, potentials: Mapping[int, float], seed: int, key: str) -> list[Candidate]:
    """All candidates, in the order of a draw without replacement; a pure function of its arguments."""
    keyed = []
    for index, (candidate, score) in enumerate(zip(proposals.candidates, proposals.scores(potentials), strict=True)):
        digest = hashlib.sha256(f"{seed}\0{key}\0{candidate.truth}\0{candidate.text}".encode()).digest()
        uniform = (int.from_bytes(digest[:7], "big") + 0.5) / 2**56
        keyed.append((score - math.log(-math.log(uniform)), index))
    return [proposals.candidates[index] for _, index in sorted(keyed, reverse=True)]


def fit_potentials(
    proposals: Iterable[Proposals],
    num_rounds: int,
    regularization: float,
    start: Mapping[int, float] | None = None,
) -> dict[int, float]:
    """Potentials that balance the choice over `proposals` (one for each caption); features near 0 are left out.

    Args:
        num_rounds: steps of the descent; 0 gives `start` back.
        regularization: pull towards `start`.
        start: potentials learnt from more captions than these.
    """
    import numpy as np
    from scipy.sparse import csr_matrix

    learnt = dict(start or {})
    rows: list[Mapping[int, float]] = []
    weights: list[float] = []
    starts = [0]
    for each in proposals:
        if each.candidates:
            rows.extend(each.differences)
            weights.extend(each.scores(learnt))
            starts.append(len(rows))
    if not rows or num_rounds == 0:
        return learnt
    matrix: Any = csr_matrix(
        (
            np.fromiter((value for row in rows for value in row.values()), dtype=np.float64),
            np.fromiter((name for row in rows for name in row), dtype=np.int64),
            np.cumsum([0, *map(len, rows)]),
        ),
        shape=(len(rows), 2**_BITS),
    )
    owner = np.repeat(np.arange(len(starts) - 1), np.diff(starts))
    entries = np.unique(matrix.indices.astype(np.int64) * len(starts) + np.repeat(owner, np.diff(matrix.indptr)))
    names, num_captions = np.unique(entries // len(starts), return_counts=True)
    used = names[num_captions >= _MIN_CAPTIONS]
    matrix = matrix[:, used].tocsr()
    columns = matrix.T.tocsr()
    edges = np.array(starts[:-1])
    sizes = np.diff(starts)
    base = np.array(weights)
    potentials = np.zeros(len(used))
    squared = np.full(len(used), 1e-8)
    for _ in range(num_rounds):
        scores = base - matrix @ potentials
        scores -= np.repeat(np.maximum.reduceat(scores, edges), sizes)
        chances = np.exp(scores)
        chances /= np.repeat(np.add.reduceat(chances, edges), sizes)
        gradient = (columns @ chances) / len(edges) - regularization * potentials
        squared += gradient**2
        potentials += _RATE * gradient / np.sqrt(squared)
    for name, value in zip(used.tolist(), potentials.tolist(), strict=True):
        learnt[name] = round(learnt.get(name, 0.0) + value, _DIGITS)
    return {name: value for name, value in learnt.items() if abs(value) >= _MIN_POTENTIAL}
