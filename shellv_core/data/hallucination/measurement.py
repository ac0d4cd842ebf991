"""How well text alone tells lies from truths.

A model that can win the contrast between a caption and its lie without the image learns nothing of the image. The
figure is a pair accuracy: the share of (truth, lie) pairs in which a fresh classifier, trained on other captions, finds
the lie more like a lie. 0.5 is chance. The classifier is linear, over hashed word 1-2-grams and character 2-4-grams,
trained on the differences of pairs, which is the strongest of its kind for this question; what a language model would
see beyond n-grams it does not tell.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shellv_core.data.hallucination.captions import RewrittenCaption
from shellv_core.errors import DataError

_WORD_BITS, _CHARACTER_BITS = 18, 18
_INVERSE_REGULARIZATION = 1.0
_WORD_OR_MARK = r"(?u)\w+|[^\w\s]"
_BOOTSTRAPS = 1000
_MIN_PAIRS = 20


@dataclass(frozen=True)
class PairAccuracy:
    """Share in [0, 1] of held-out pairs told right (ties count half), with its 95 % bootstrap interval."""

    value: float
    low: float
    high: float
    num_pairs: int  # held-out pairs that were judged


def pairs_by_type(captions: Sequence[RewrittenCaption]) -> dict[str, list[tuple[str, str]]]:
    """(truth, lie) pairs of rewritten captions by type."""
    pairs: dict[str, list[tuple[str, str]]] = {}
    for caption in captions:
        for rewrite in caption.rewrites:
            pairs.setdefault(rewrite.hallucinated.type, []).append((rewrite.truth, rewrite.hallucinated.text))
    return pairs


def measure(pairs: dict[str, list[tuple[str, str]]], seed: int = 0) -> dict[str, PairAccuracy]:
    """Pair accuracy of each type, by a classifier of its own.

    Args:
        pairs: (truth, lie) by type. All pairs of one truth fall into the same half.
        seed: Of the halves and the bootstrap.

    Raises:
        DataError: if a type has fewer than 20 pairs.
    """
    return {kind: _measure_one(kind, of_kind, seed) for kind, of_kind in sorted(pairs.items())}


def _measure_one(kind: str, pairs: list[tuple[str, str]], seed: int) -> PairAccuracy:
    import numpy as np
    from sklearn.linear_model import LogisticRegression

    if len(pairs) < _MIN_PAIRS:
        raise DataError(
            f"{len(pairs)} pairs of type {kind!r} are too few to measure; at least {_MIN_PAIRS} are needed."
        )
    features = _features([lie for _, lie in pairs]) - _features([truth for truth, _ in pairs])
    held_out = np.array([_half(truth.strip().lower(), seed) for truth, _ in pairs], dtype=bool)
    if held_out.all() or not held_out.any():
        raise DataError(f"the pairs of type {kind!r} all have the same truth, so no half can be held out.")
    train = features[~held_out]
    # Each difference once as it is and once turned round, so that no constant can help.
    signs = np.where(np.arange(train.shape[0]) % 2, -1.0, 1.0)
    model = LogisticRegression(C=_INVERSE_REGULARIZATION, fit_intercept=False, max_iter=300, random_state=0)
    model.fit(train.multiply(signs[:, None]).tocsr(), signs > 0)
    scores = model.decision_function(features[held_out])
    told = np.where(np.abs(scores) < 1e-9, 0.5, scores > 0)
    rng = np.random.default_rng(seed)
    means = told[rng.integers(0, len(told), (_BOOTSTRAPS, len(told)))].mean(axis=1)
    low, high = np.quantile(means, [0.025, 0.975])
    return PairAccuracy(float(told.mean()), float(low), float(high), len(told))


def _half(text: str, seed: int) -> bool:
    return bool(hashlib.sha256(f"{seed}\0{text}".encode()).digest()[0] & 1)


def _features(texts: list[str]) -> Any:
    from scipy.sparse import hstack
    from sklearn.feature_extraction.text import HashingVectorizer

    words = HashingVectorizer(
        ngram_range=(1, 2), n_features=2**_WORD_BITS, token_pattern=_WORD_OR_MARK, norm=None, alternate_sign=False
    )
    characters = HashingVectorizer(
        analyzer="char_wb", ngram_range=(2, 4), n_features=2**_CHARACTER_BITS, norm="l2", alternate_sign=False
    )
    case = HashingVectorizer(
        analyzer="char", ngram_range=(1, 2), n_features=2**14, norm="l2", alternate_sign=False, lowercase=False
    )
    framed = [f"^ {text} $" for text in texts]
    return hstack([words.transform(framed), characters.transform(texts), case.transform(framed)]).tocsr()
