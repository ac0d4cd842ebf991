import re
from dataclasses import dataclass

import pytest

from shellv_core.errors import PromotionError
from shellv_core.tracking.gate import Thresholds, decide, holm, read_thresholds

CANDIDATE = {
    "pope_random_accuracy": 0.70,
    "blind_pope_random_accuracy": 0.52,
    "chair_instance_rate": 0.40,
    "blind_chair_instance_rate": 0.80,
    "pope_random_unparsed_share": 0.01,
}


@dataclass
class Paired:
    difference: float
    low: float
    high: float
    p_value: float = 1.0


@pytest.mark.parametrize(
    ("rules", "promoted"),
    [
        ({"minimum": {"pope_random_accuracy": 0.70}}, True),
        ({"minimum": {"pope_random_accuracy": 0.71}}, False),
        ({"maximum": {"pope_random_unparsed_share": 0.01}}, True),
        ({"maximum": {"chair_instance_rate": 0.39}}, False),
        ({"gain_over_blind": {"pope_random_accuracy": 0.15}}, True),
        ({"gain_over_blind": {"pope_random_accuracy": 0.20}}, False),
        ({"gain_over_blind": {"chair_instance_rate": 0.30}}, True),
        ({"gain_over_blind": {"chair_instance_rate": 0.50}}, False),
        ({"not_worse_than_champion": {"pope_random_accuracy": 0.0}}, True),
    ],
)
def test_rules_without_champion(rules, promoted):
    verdict = decide(CANDIDATE, None, Thresholds(**rules))
    assert verdict.promoted is promoted
    assert len(verdict.reasons) == 1


@pytest.mark.parametrize(
    ("metric", "champion", "interval", "promoted"),
    [
        ("pope_random_accuracy", 0.74, None, True),
        ("pope_random_accuracy", 0.76, None, False),
        ("pope_random_accuracy", 0.70, (-0.04, 0.04), True),
        ("pope_random_accuracy", 0.70, (-0.06, 0.06), False),
        ("chair_instance_rate", 0.36, None, True),
        ("chair_instance_rate", 0.34, None, False),
        ("chair_instance_rate", 0.40, (-0.30, 0.04), True),
        ("chair_instance_rate", 0.40, (-0.30, 0.06), False),
    ],
)
def test_not_worse_than_champion(metric, champion, interval, promoted):
    thresholds = Thresholds(not_worse_than_champion={metric: 0.05})
    paired = {} if interval is None else {metric: Paired(0.0, *interval)}
    assert decide(CANDIDATE, {metric: champion}, thresholds, paired).promoted is promoted


def test_holm_by_hand():
    # 4 x 0.01, then 3 x 0.02, 2 x 0.03, and 0.04 raised to the one before.
    adjusted = holm({"d": 0.04, "a": 0.01, "c": 0.03, "b": 0.02})
    assert adjusted == pytest.approx({"d": 0.06, "a": 0.04, "c": 0.06, "b": 0.06})
    assert list(adjusted) == ["d", "a", "c", "b"]
    assert holm({"a": 0.7, "b": 0.8}) == {"a": 1.0, "b": 1.0}
    assert holm({}) == {}


CHAMPION = {"pope_random_accuracy": 0.65, "chair_instance_rate": 0.45}


@pytest.mark.parametrize(
    ("rules", "paired", "promoted"),
    [
        ({"require_gain": ["pope_random_accuracy"]}, {"pope_random_accuracy": (0.05, 0.04)}, True),
        ({"require_gain": ["pope_random_accuracy"]}, {"pope_random_accuracy": (0.05, 0.06)}, False),
        ({"require_gain": ["pope_random_accuracy"], "alpha": 0.1}, {"pope_random_accuracy": (0.05, 0.06)}, True),
        ({"require_gain": ["pope_random_accuracy"]}, {"pope_random_accuracy": (-0.05, 0.001)}, False),
        # A rate that falls is a gain.
        ({"require_gain": ["chair_instance_rate"]}, {"chair_instance_rate": (-0.05, 0.01)}, True),
        ({"require_gain": ["chair_instance_rate"]}, {"chair_instance_rate": (0.05, 0.01)}, False),
        # Two rules: 2 x 0.03 is above 0.05.
        (
            {"require_gain": ["pope_random_accuracy", "chair_instance_rate"]},
            {"pope_random_accuracy": (0.05, 0.03), "chair_instance_rate": (-0.05, 0.04)},
            False,
        ),
        (
            {"require_gain": ["pope_random_accuracy", "chair_instance_rate"]},
            {"pope_random_accuracy": (0.05, 0.02), "chair_instance_rate": (-0.05, 0.04)},
            True,
        ),
        ({"no_loss": "all"}, {"pope_random_accuracy": (-0.05, 0.04)}, False),
        ({"no_loss": "all"}, {"pope_random_accuracy": (-0.05, 0.04), "chair_instance_rate": (0.0, 1.0)}, True),
        ({"no_loss": ["pope_random_accuracy"]}, {"pope_random_accuracy": (-0.05, 0.04)}, False),
        ({"no_loss": ["chair_instance_rate"]}, {"chair_instance_rate": (0.05, 0.04)}, False),
        ({"no_loss": ["chair_instance_rate"]}, {"chair_instance_rate": (-0.05, 0.04)}, True),
        # On other questions nothing can be tested.
        ({"require_gain": ["pope_random_accuracy"]}, {}, False),
        ({"no_loss": "all"}, {}, False),
        ({"no_loss": ["pope_random_accuracy"]}, {}, False),
    ],
)
def test_significant_gain_and_no_significant_loss(rules, paired, promoted):
    compared = {metric: Paired(value, value - 0.1, value + 0.1, p) for metric, (value, p) in paired.items()}
    verdict = decide(CANDIDATE, CHAMPION, Thresholds(**rules), compared)
    assert verdict.promoted is promoted, verdict.reasons
    assert decide(CANDIDATE, None, Thresholds(**rules)).reasons == ["there is no champion to compare with"]


def test_reasons_of_gain_and_loss_are_told_in_words():
    rules = Thresholds(require_gain=["chair_instance_rate"], no_loss="all")
    paired = {
        "chair_instance_rate": Paired(-0.05, -0.08, -0.02, 0.004),
        "pope_random_accuracy": Paired(-0.1, -0.2, -0.05, 0.001),
    }
    assert decide(CANDIDATE, CHAMPION, rules, paired).reasons == [
        "pope_random_accuracy: gain -0.1000 over the champion on the same questions, p = 0.001, 0.002 by Holm's method;"
        " no significant loss (at most 0.05) is allowed",
        "chair_instance_rate: gain +0.0500 over the champion on the same questions, p = 0.004, 0.004 by Holm's method;"
        " a significant gain (at most 0.05) is needed",
        "chair_instance_rate: gain +0.0500 over the champion on the same questions, p = 0.004, 0.004 by Holm's method;"
        " no significant loss (at most 0.05) is allowed",
    ]
    (reason,) = decide(CANDIDATE, CHAMPION, Thresholds(no_loss="all"), {}).reasons
    assert "was not asked the same questions" in reason


def test_all_rules_are_told_failed_ones_first():
    rules = Thresholds(
        minimum={"pope_random_accuracy": 0.6}, maximum={"chair_instance_rate": 0.3, "pope_random_unparsed_share": 0.05}
    )
    verdict = decide(CANDIDATE, None, rules)
    assert not verdict.promoted
    assert [reason.split()[0] for reason in verdict.reasons] == [
        "chair_instance_rate",
        "pope_random_accuracy",
        "pope_random_unparsed_share",
    ]


@pytest.mark.parametrize("section", ["minimum", "maximum", "gain_over_blind", "not_worse_than_champion"])
def test_unknown_metric_gives_the_nearest_name(section):
    with pytest.raises(PromotionError, match=r"'pope_random_acuracy'.*did you mean 'pope_random_accuracy'"):
        decide(CANDIDATE, None, Thresholds(**{section: {"pope_random_acuracy": 0.1}}))


@pytest.mark.parametrize("section", ["require_gain", "no_loss"])
def test_unknown_metric_of_a_list_gives_the_nearest_name(section):
    with pytest.raises(PromotionError, match=r"'pope_random_acuracy'.*did you mean 'pope_random_accuracy'"):
        decide(CANDIDATE, None, Thresholds(**{section: ["pope_random_acuracy"]}))


def test_metrics_that_a_comparison_lacks():
    with pytest.raises(PromotionError, match="'blind_pope_random_unparsed_share'"):
        decide(CANDIDATE, None, Thresholds(gain_over_blind={"pope_random_unparsed_share": 0.0}))
    with pytest.raises(PromotionError, match="the champion's evaluation lacks 'chair_instance_rate'"):
        decide(CANDIDATE, {"x": 1.0}, Thresholds(not_worse_than_champion={"chair_instance_rate": 0.1}))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("minimun: {a: 1}", "unknown key 'minimun'; did you mean 'minimum'"),
        ("minimum: {a: high}", "minimum.a='high'"),
        ("minimum:", "no rule is given"),
        ("- 1", "holds list; a mapping"),
        ("a: [", "not valid YAML"),
        ("not_worse_than_champion: {a: -1}", "must not be negative"),
        ("alpha: 0.01", "no rule is given"),
        ("{no_loss: all, alpha: 1}", "alpha=1"),
        ("no_loss: most", "no_loss"),
    ],
)
def test_bad_files(content, message):
    with pytest.raises(PromotionError, match=re.escape(message)):
        read_thresholds(content, "file:///t.yaml")
