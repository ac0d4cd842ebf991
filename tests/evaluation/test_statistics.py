import random

import pytest

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.statistics import bootstrap_interval, compare_paired, mcnemar
from shellv_core.evaluation.yes_no import wilson_interval


def questions(*parts):
    return {str(number): part for number, part in enumerate(parts)}


def test_bootstrap_of_a_share_agrees_with_wilson():
    low, high = bootstrap_interval(questions(*[(1, 1)] * 70, *[(0, 1)] * 30))
    expected = wilson_interval(70, 100)
    assert (low, high) == (pytest.approx(expected[0], abs=0.02), pytest.approx(expected[1], abs=0.02))
    assert bootstrap_interval({}) == bootstrap_interval(questions((0, 0))) == (0, 1)


def test_questions_about_one_image_count_as_one():
    # Ten images with ten questions each, all right or all wrong: as ten questions, not as a hundred.
    outcomes = {f"{image}-{number}": (image % 2, 1) for image in range(10) for number in range(10)}
    images = {key: key.partition("-")[0] for key in outcomes}
    clustered = bootstrap_interval(outcomes, images)
    assert clustered == bootstrap_interval(questions(*[(image % 2, 1) for image in range(10)]))
    low, high = bootstrap_interval(outcomes)
    assert clustered[1] - clustered[0] > 2.5 * (high - low)


@pytest.mark.parametrize(("first", "second"), [(0, 0), (5, 5), (10, 0), (3, 9), (40, 62)])
def test_mcnemar_is_the_binomial_test_where_each_image_has_one_question(first, second):
    from scipy.stats import binomtest

    expected = binomtest(first, first + second, 0.5).pvalue if first + second else 1
    assert mcnemar([1] * first + [-1] * second + [0] * 7) == pytest.approx(expected)


def test_mcnemar_by_cluster_by_hand():
    # Signs of 2 and 1: sums 3, 1, -1, -3, each with chance 1/4.
    assert mcnemar([2, 1]) == pytest.approx(2 / 4)
    assert mcnemar([2, -1]) == pytest.approx(1)
    # Signs of 1, 1, 2: 4, 2, 2, 0, 0, -2, -2, -4.
    assert mcnemar([1, 1, 2]) == pytest.approx(2 / 8)
    assert mcnemar([1, -1, 2]) == pytest.approx(6 / 8)


def test_right_answers_about_one_image_are_no_evidence_of_many():
    first, second = questions(*[(1, 1)] * 10), questions(*[(0, 1)] * 10)
    assert compare_paired(first, second).p_value == pytest.approx(2 / 2**10)
    compared = compare_paired(first, second, dict.fromkeys(first, "image"))
    assert (compared.p_value, compared.num_pairs, compared.num_clusters, compared.test) == (1, 10, 1, "mcnemar")


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
    low, high = bootstrap_interval(first)
    assert compared.high - compared.low < (high - low) / 2


def test_ratios_with_several_trials():
    first = {str(index): (1, 4) for index in range(50)}
    second = {str(index): (2, 4) for index in range(50)}
    compared = compare_paired(first, second)
    assert (compared.difference, compared.low, compared.high) == (-0.25, -0.25, -0.25)
    assert compared.test == "bootstrap"
    assert compared.p_value == pytest.approx(2 / 2001), "as little as so many resamples can show"
    assert compare_paired(first, first).p_value == 1
    few = {key: first[key] for key in list(first)[:3]}
    assert compare_paired(few, second).p_value == 1 / 4, "as little as three clusters can show"


def test_models_that_name_nothing():
    silent = {str(index): (0, 0) for index in range(9)}
    compared = compare_paired(silent, dict.fromkeys(silent, (1, 2)))
    assert (compared.difference, compared.low, compared.high) == (-0.5, -0.5, -0.5)


def test_nothing_in_common():
    with pytest.raises(EvaluationError, match="share no question"):
        compare_paired({"a": (1, 1)}, {"b": (1, 1)})
