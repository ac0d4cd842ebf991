import random

import pytest

from shellv_core.data.hallucination.balance import Proposals, choose, differences, fit_potentials
from shellv_core.data.hallucination.measurement import measure
from shellv_core.data.hallucination.rules import Candidate
from shellv_core.errors import DataError

COLORS = ["red", "blue", "green", "black"]
SHARES = [8, 4, 2, 1]


def proposals(number, seed=0):
    """Captions whose colors are common or rare, each with all other colors, rare ones favored."""
    rng = random.Random(seed)
    found = []
    for index in range(number):
        own = rng.choices(COLORS, SHARES)[0]
        truth = f"{rng.choice(['a', 'one', 'this'])} {own} {rng.choice(['bus', 'car', 'cup', 'hat'])} number {index}"
        others = [color for color in COLORS if color != own]
        candidates = [
            Candidate(truth.replace(own, color), truth, own, color, float(COLORS.index(color)), "color")
            for color in others
        ]
        found.append(Proposals.of(candidates))
    return found


def pairs(found, potentials):
    chosen = [choose(items, potentials, seed=1, key=str(index))[0] for index, items in enumerate(found)]
    return {"attribute": [(item.truth, item.text) for item in chosen]}


def test_balance_takes_the_text_only_advantage_away():
    potentials = fit_potentials(proposals(1500), num_rounds=300, regularization=1e-5)
    plain = measure(pairs(proposals(1500, seed=9), {}))["attribute"]
    balanced = measure(pairs(proposals(1500, seed=9), potentials))["attribute"]
    assert plain.value > 0.8
    assert 0.4 < balanced.value < 0.6
    assert plain.low <= plain.value <= plain.high
    assert plain.low > balanced.high


def test_captions_that_were_not_learnt_from_are_balanced_among_themselves():
    learnt = fit_potentials(proposals(60, seed=1), num_rounds=300, regularization=1e-5)
    batch = proposals(1500, seed=9)
    refined = fit_potentials(batch, num_rounds=300, regularization=1e-5, start=learnt)
    alone = measure(pairs(batch, learnt))["attribute"]
    together = measure(pairs(batch, refined))["attribute"]
    assert abs(together.value - 0.5) < 0.06 < abs(alone.value - 0.5)
    assert fit_potentials(batch, num_rounds=0, regularization=1e-5, start=learnt) == learnt


def test_choice_is_a_pure_function_and_follows_the_weights():
    candidates = Proposals.of(
        [
            Candidate(f"a {color} bus", "a bus", "", color, weight, "")
            for color, weight in zip(COLORS, SHARES, strict=True)
        ]
    )
    assert choose(candidates, {}, 0, "k") == choose(candidates, {}, 0, "k")
    first = [choose(candidates, {}, seed, "k")[0].replacement for seed in range(300)]
    assert 280 > first.count("red") > 250 or first.count("red") >= 280
    assert len({tuple(item.replacement for item in choose(candidates, {}, seed, "k")) for seed in range(50)}) > 1


def test_differences_are_signed_and_vanish_for_equal_texts():
    there, back = differences("a red bus", "a blue bus"), differences("a blue bus", "a red bus")
    assert there == {name: -value for name, value in back.items()}
    assert differences("a red bus", "a red bus") == {}


def test_style_gives_lies_away_to_the_measurement():
    told = [(f"a bus number {index}", f"a bus number {index}, with onlookers cheering") for index in range(200)]
    assert measure({"event": told})["event"].value > 0.99


def test_too_few_pairs_are_an_error():
    with pytest.raises(DataError, match="3 pairs of type 'event' are too few"):
        measure({"event": [("a", "b")] * 3})
    with pytest.raises(DataError, match="all have the same truth"):
        measure({"event": [("a", "b")] * 30})
