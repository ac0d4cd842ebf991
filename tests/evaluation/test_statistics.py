import random

import pytest

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.statistics import bootstrap_interval, compare_paired, mcnemar
from shellv_core.evaluation.yes_no import wilson_interval


def test_bootstrap_of_a_share_agrees_with_wilson():
    low, high = bootstrap_interval([(1, 1)] * 70 + [(0, 1)] * 30)
    expected = wilson_interval(70, 100)
    assert (low, high) == (pytest.approx(expected[0], abs=0.02), pytest.approx(expected[1], abs=0.02))
    assert bootstrap_interval([]) == bootstrap_interval([(0, 0)]) == (0, 1)


def test_mcnemar():
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    assert mcnemar(10, 0) == pytest.approx(2 / 2**10)


def test_paired_comparison():
    first = {str(index): (int(index < 80), 1) for index in range(100)}
    second = {str(index): (int(index < 60), 1) for index in range(100)}
    compared = compare_paired(first, second)
    assert compared.difference == pytest.approx(0.2)
    assert 0.1 < compared.low < 0.2 < compared.high < 0.3
    assert (compared.only_first, compared.only_second) == (20, 0)
    assert compared.p_value < 1e-4
    assert compare_paired(first, dict(reversed(second.items()))) == compared, "joined by key, not by position"


def test_pairing_is_sharper_than_two_intervals():
    rng = random.Random(0)
    first = {str(index): (int(rng.random() < 0.5), 1) for index in range(400)}
    second = {key: (value if rng.random() < 0.98 else 1 - value, 1) for key, (value, _) in first.items()}
    compared = compare_paired(first, second)
    low, high = bootstrap_interval(list(first.values()))
    assert compared.high - compared.low < (high - low) / 2


def test_ratios_with_several_trials():
    first = {str(index): (1, 4) for index in range(50)}
    second = {str(index): (2, 4) for index in range(50)}
    compared = compare_paired(first, second)
    assert (compared.difference, compared.low, compared.high) == (-0.25, -0.25, -0.25)
    assert compared.p_value == 0
    assert compare_paired(first, first).p_value == 1


def test_models_that_name_nothing():
    silent = {str(index): (0, 0) for index in range(9)}
    compared = compare_paired(silent, dict.fromkeys(silent, (1, 2)))
    assert (compared.difference, compared.low, compared.high) == (-0.5, -0.5, -0.5)


def test_nothing_in_common():
    with pytest.raises(EvaluationError, match="share no question"):
        compare_paired({"a": (1, 1)}, {"b": (1, 1)})
