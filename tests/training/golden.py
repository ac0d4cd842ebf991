"""Losses worked out by hand, and what a fault in the code would change.

Two images in two dimensions, T = 0.2, so that every score cos / T is a whole number or close to one:

    v1 = (1, 0)       v2 = (0, 1)
    t1 = (0.8, 0.6)   t2 = (0.6, 0.8)      v1.t1 / T = 4   v1.t2 / T = 3   v2.t1 / T = 3   v2.t2 / T = 4
    h1 = (0, 1)       h2 = (0.8, 0.6)      v1.h1 / T = 0   v1.h2 / T = 4   v2.h1 / T = 5   v2.h2 / T = 3

L(a, b, ...) below is log(e^a + e^b + ...). A row's loss is L(its scores) - 4, as 4 is the score of what is right.
"""

from __future__ import annotations

import pytest
import torch

from shellv_core.training.losses import hacl, preference, queue

VECTORS = {
    "image": [[1.0, 0.0], [0.0, 1.0]],
    "caption": [[0.8, 0.6], [0.6, 0.8]],
    "hallucinated": [[[0.0, 1.0]], [[0.8, 0.6]]],
}
CAPTIONS, LIES = [1, 2], [[11], [12]]
#: q = (0.6, -0.8): v1.q / T = 3, v2.q / T = -4; the image w = (0, -1): t1.w / T = -3, t2.w / T = -4. A second slot that
#: was never filled holds what would be right for everyone.
QUEUE = {"text": [[0.6, -0.8], [1.0, 1.0]], "image": [[0.0, -1.0], [1.0, 1.0]], "valid": [True, False]}
#: u1 = (0.6, -0.8): v1.u1 / T = 3; h1 is told from it, and score 0 of h1 leaves the rows above.
TRUTH = {
    "truth": [[[0.6, -0.8]], [[0.0, 0.0]]],
    "truth_valid": [[True], [False]],
    "truth_group": [[21], [22]],
}

#: Name -> (settings, what is expected).
CASES = {
    # i2t = (L(4,3,0) + L(4,3,3)) / 2 - 4; t2i = L(4,3) - 4 for both captions. cos: (0.8 - 0 + 0.8 - 0.6) / 2 = 0.5.
    "paired": (
        {"mode": "paired"},
        {
            "image_to_text": 0.4390036775997608,
            "text_to_image": 0.3132616875182226,
            "retrieval_accuracy": 1.0,
            "hallucination_margin": 0.5,
            "hallucination_accuracy": 1.0,
        },
    ),
    # i2t = (L(4,3,0,4) + L(4,3,5,3)) / 2 - 4. Image 2 scores h1 highest.
    "batch": (
        {"mode": "batch"},
        {"image_to_text": 1.181755894849612, "text_to_image": 0.3132616875182226, "retrieval_accuracy": 0.5},
    ),
    # Image 2 is no row and nobody's negative: i2t = L(4,0) - 4, t2i = L(4) - 4.
    "a row left out": (
        {"mode": "batch", "valid": [True, False]},
        {"image_to_text": 0.01814992791780945, "text_to_image": 0.0, "hallucination_margin": 0.8},
    ),
    # Image 2 has no lie: i2t = (L(4,3,0) + L(4,3,5)) / 2 - 4.
    "a lie left out": (
        {"mode": "batch", "hallucinated_valid": [[True], [False]]},
        {"image_to_text": 0.8670843028559254, "hallucination_margin": 0.8},
    ),
    # Both captions say the same: i2t = (L(4,0,4) + L(4,5,3)) / 2 - 4, t2i = 0.
    "duplicate captions": (
        {"mode": "batch", "caption_group": [1, 1]},
        {"image_to_text": 1.0549346429417379, "text_to_image": 0.0},
    ),
    # h2 says what caption 1 says: i2t = (L(4,3,0) + L(4,3,5,3)) / 2 - 4.
    "true by chance": (
        {"mode": "batch", "hallucinated_group": [[11], [1]]},
        {"image_to_text": 0.9101871751698543},
    ),
    # h1 says what caption 1 says, so it is no lie of image 1: the only pair left is image 2's, 0.8 - 0.6.
    "no lie at all": (
        {"mode": "paired", "hallucinated_group": [[1], [12]]},
        {"hallucination_margin": 0.2},
    ),
    # i2t = (L(4,3,0,3) + L(4,3,3,-4)) / 2 - 4, t2i = (L(4,3,-3) + L(4,3,-4)) / 2 - 4.
    "paired, queue": (
        {"mode": "paired", "queue": [31, 32]},
        {"image_to_text": 0.556789670219648, "text_to_image": 0.3137175024148644},
    ),
    # i2t = (L(4,3,0,4,3) + L(4,3,5,3,-4)) / 2 - 4.
    "batch, queue": (
        {"mode": "batch", "queue": [31, 32]},
        {"image_to_text": 1.2534842409590876, "text_to_image": 0.3137175024148644},
    ),
    # q and w have caption 2's words: i2t = (L(4,3,0,3) + L(4,3,3)) / 2 - 4, t2i = (L(4,3,-3) + L(4,3)) / 2 - 4.
    "queue says the same": (
        {"mode": "paired", "queue": [2, 32]},
        {"image_to_text": 0.5566930467142801, "text_to_image": 0.3135948960324493},
    ),
    # truth = L(3,0) - 3; i2t = (L(4,3) + L(4,3,3)) / 2 - 4. cos: (0.6 - 0 + 0.8 - 0.6) / 2 = 0.4.
    "paired, truth": (
        {"mode": "paired", **TRUTH},
        {"truth": 0.04858735157374206, "image_to_text": 0.43235320072513694, "hallucination_margin": 0.4},
    ),
    # i2t = (L(4,3,4) + L(4,3,3)) / 2 - 4.
    "batch, truth": (
        {"mode": "batch", **TRUTH},
        {"truth": 0.04858735157374206, "image_to_text": 0.7067197589951513},
    ),
    # h2 says what truth 1 says: i2t = (L(4,3) + L(4,3,3)) / 2 - 4 although negatives are the batch's.
    "truth by chance": (
        {"mode": "batch", **TRUTH, "hallucinated_group": [[11], [21]]},
        {"image_to_text": 0.43235320072513694},
    ),
    # As "paired, truth": the second slot holds no truth, whatever its group.
    "a truth that is none": (
        {"mode": "paired", **TRUTH, "truth_group": [[21], [1]]},
        {"truth": 0.04858735157374206, "image_to_text": 0.43235320072513694, "text_to_image": 0.3132616875182226},
    ),
    # t2 = (-0.6, 0.8), so v1.t2 / T = -3 while v2.t1 / T = 3. Image 2: L(4,3,3) - 4, caption 2: L(4,-3) - 4.
    "unlike in both directions": (
        {"mode": "paired", "caption": [[0.8, 0.6], [-0.6, 0.8]], "rows": (1, 2), "num_ranks": 2},
        {"image_to_text": 0.5514447139320513, "text_to_image": 0.0009114664537746009},
    ),
    # m = 0.5: t1.h1 = 0.6 gives 0.5 - 0.4 = 0.1, t2.h2 = 0.96 gives 0.5 - 0.04 = 0.46.
    "margin": ({"mode": "paired", "text_margin": 0.5}, {"text_margin": 0.28}),
    # u1.h1 = -0.8 is far enough: (0 + 0.46) / 2.
    "margin, truth": ({"mode": "paired", "text_margin": 0.5, **TRUTH}, {"text_margin": 0.23}),
    # The second of two processes has image 2: twice (L(4,3,5,3) - 4) / 2, twice (L(4,3) - 4) / 2.
    "second process, batch": (
        {"mode": "batch", "rows": (1, 2), "num_ranks": 2},
        {
            "image_to_text": 1.4938117090722383,
            "text_to_image": 0.3132616875182226,
            "retrieval_accuracy": 0.0,
            "hallucination_margin": 0.2,
        },
    ),
    # Twice (L(4,3,3) - 4) / 2.
    "second process, paired": (
        {"mode": "paired", "rows": (1, 2), "num_ranks": 2},
        {"image_to_text": 0.5514447139320513, "text_to_image": 0.3132616875182226},
    ),
}


def tensors(values):
    return {
        name: torch.tensor(value, dtype=torch.float64 if name in (*VECTORS, "truth") else None)
        for name, value in values.items()
    }


def queued(groups):
    features = {name: torch.tensor(QUEUE[name], dtype=torch.float64) for name in ("text", "image")}
    valid, groups = torch.tensor(QUEUE["valid"]), torch.tensor(groups)
    return hacl.QueuedNegatives(features["text"], valid, groups, features["image"], valid, groups)


def arguments(name, module=hacl):
    """The features and keyword arguments of a case."""
    settings = dict(CASES[name][0])
    options = {key: settings.pop(key) for key in ("mode", "text_margin", "rows", "num_ranks") if key in settings}
    if "queue" in settings:
        options["queue"] = queued(settings.pop("queue"))
    values = {**VECTORS, "caption_group": CAPTIONS, "hallucinated_group": LIES, **settings}
    return module.ContrastFeatures.of(**tensors(values)), options


def check_hacl(name, module=hacl):
    """Raise AssertionError where the loss of a case is not what was worked out."""
    features, options = arguments(name, module)
    result = module.contrastive_loss(features, torch.tensor(0.2, dtype=torch.float64), **options)
    for key, expected in CASES[name][1].items():
        assert float(getattr(result, key)) == pytest.approx(expected, rel=1e-12, abs=1e-12), key


def check_queue(module=queue):
    """Three steps through a queue of 4: what it holds, in which order it was filled."""
    ring = module.NegativeQueue(4, 2)
    assert not ring.contents().text_valid.any()
    features, _ = arguments("paired")
    ring.push(features)
    # Captions 1 and 2, lies 11 and 12; images carry their captions' groups.
    assert ring.contents().text_group.tolist() == [1, 2, 11, 12]
    assert ring.contents().image_group[ring.contents().image_valid].tolist() == [1, 2]
    torch.testing.assert_close(ring.contents().text[2], torch.tensor([0.0, 1.0]))
    # h1 is told from its truth and image 2 left out: only caption 1 comes, and the oldest text goes.
    told, _ = arguments("paired, truth")
    values = {**vars(told), "valid": torch.tensor([True, False]), "caption_group": torch.tensor([5, 6])}
    ring.push(hacl.ContrastFeatures(**values))
    assert ring.contents().text_group.tolist() == [5, 2, 11, 12]
    assert ring.contents().image_group[ring.contents().image_valid].tolist() == [1, 2, 5]
    # Images 1 and 2 once more, without lies: texts go on behind caption 5, images wrap round.
    values = {**vars(features), "hallucinated_valid": torch.zeros(2, 1, dtype=torch.bool)}
    ring.push(hacl.ContrastFeatures(**{**values, "caption_group": torch.tensor([7, 8])}))
    assert ring.contents().text_group.tolist() == [5, 7, 8, 12]
    assert ring.contents().image_group.tolist() == [8, 2, 5, 7]
    assert ring.fill() == 1.0


#: log p of the caption, the lie and the caption elsewhere: what learns, and the reference.
POLICY = ([-2.0, -3.0], [-4.0, -3.5], [-5.0, 0.0])
REFERENCE = ([-2.5, -2.0], [-3.0, -3.0], [-4.0, 0.0])


def check_preference(module=preference):
    """beta = 0.5, anchor = 0.1, of pair 2 no other image is known.

    r(w) = 0.5 * (0.5, -1) = (0.25, -0.5), r(l) = 0.5 * (-1, -0.5) = (-0.5, -0.25), r(w|x') = 0.5 * -1 = -0.5.
    -log sigmoid(x) = log(1 + e^-x).
    """
    log_probabilities = [
        module.AnswerLogProbabilities(*(torch.tensor(each, dtype=torch.float64) for each in side))
        for side in (POLICY, REFERENCE)
    ]
    result = module.preference_loss(*log_probabilities, torch.tensor([True, False]), 0.5, 0.1)
    expected = {
        # (log(1 + e^-0.75) + log(1 + e^0.25)) / 2
        "answer": 0.6064052129968718,
        # log(1 + e^-0.75)
        "image": 0.38687100611489994,
        # (log(1 + e^-0.15) + log(1 + e^0.6)) / 2
        "anchor": 0.8292224991377088,
        # (0.75 - 0.25) / 2
        "reward_margin": 0.25,
        "image_reward_margin": 0.75,
        "accuracy": 0.5,
    }
    for key, value in expected.items():
        assert float(getattr(result, key)) == pytest.approx(value, rel=1e-12), key
    # answer + 2 * image + 3 * anchor
    assert float(result.objective(2.0, 3.0)) == pytest.approx(
        expected["answer"] + 2 * expected["image"] + 3 * expected["anchor"]
    )
