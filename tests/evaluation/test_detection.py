import numpy as np
import pytest
from scipy.stats import mannwhitneyu

from shellv_core.evaluation.detection import Scored, area, best_threshold, calibration, fit_risk, roc


def items(scores, false):
    return [
        Scored(float(score), bool(lie), str(index))
        for index, (score, lie) in enumerate(zip(scores, false, strict=False))
    ]


def drawn(count=400, seed=0, slope=-2.0, intercept=-0.5):
    generator = np.random.default_rng(seed)
    scores = np.round(generator.normal(size=count), 2)
    false = generator.random(count) < 1 / (1 + np.exp(-(slope * scores + intercept)))
    return scores, false


def test_the_area_is_mann_whitneys_with_ties():
    scores, false = drawn()
    statistic = mannwhitneyu(scores[~false], scores[false]).statistic
    found = area(items(scores, false))
    assert found.value == pytest.approx(statistic / (false.sum() * (~false).sum()))
    assert found.low < found.value < found.high
    assert found.high - found.low < 0.12


def test_the_area_lies_under_the_curve():
    scores, false = drawn()
    points = roc(items(scores, false))
    assert points[0] == (0, 0)
    assert points[-1] == (1, 1)
    assert area(items(scores, false)).value == pytest.approx(
        np.trapezoid(*zip(*[(y, x) for x, y in points], strict=False))
    )


def test_images_are_resampled_whole():
    scores, false = drawn(60)
    alone = area(items(scores, false))
    again = [Scored(each.score, each.false, each.cluster) for each in items(scores, false) for _ in range(9)]
    copied = area(again)
    assert copied.value == pytest.approx(alone.value)
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.01)


def test_one_class_tells_nothing():
    found = area(items([1, 2], [False, False]))
    assert (found.value, found.low, found.high) == (0.5, 0, 1)


def test_the_threshold_parts_what_can_be_parted():
    threshold = best_threshold(items([0.1, 0.2, 0.3, 0.7, 0.8], [True, True, True, False, False]))
    assert 0.3 < threshold < 0.7


def test_fitted_risks_are_frequencies():
    scores, false = drawn(4000)
    slope, intercept = fit_risk(items(scores, false))
    assert slope == pytest.approx(-2, abs=0.25)
    assert intercept == pytest.approx(-0.5, abs=0.15)
    risks = 1 / (1 + np.exp(-(slope * scores + intercept)))
    error, bins = calibration(risks.tolist(), false.tolist())
    assert error < 0.03
    assert sum(each.count for each in bins) == 4000
    assert calibration((1 - risks).tolist(), false.tolist())[0] > 0.2


def test_a_score_that_points_the_wrong_way_gives_the_base_rate():
    scores, false = drawn()
    slope, intercept = fit_risk(items(-scores, false))
    assert slope == 0
    assert 1 / (1 + np.exp(-intercept)) == pytest.approx(false.mean())


def test_equal_risks_stay_in_one_bin():
    error, bins = calibration([0.25] * 40, [True] * 10 + [False] * 30)
    assert error == pytest.approx(0)
    assert [each.count for each in bins] == [40]
