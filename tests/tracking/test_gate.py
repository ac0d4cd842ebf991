import re

import pytest

from shellv_core.errors import PromotionError
from shellv_core.tracking.gate import Thresholds, decide, read_thresholds

CANDIDATE = {
    "pope_random_accuracy": 0.70,
    "blind_pope_random_accuracy": 0.52,
    "chair_instance_rate": 0.40,
    "blind_chair_instance_rate": 0.80,
    "pope_random_unparsed_share": 0.01,
}


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
    paired = {} if interval is None else {metric: interval}
    assert decide(CANDIDATE, {metric: champion}, thresholds, paired).promoted is promoted


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
    ],
)
def test_bad_files(content, message):
    with pytest.raises(PromotionError, match=re.escape(message)):
        read_thresholds(content, "file:///t.yaml")
