import pytest

from shellv_core.charts import Bar, Series, bar_chart
from shellv_core.evaluation.benchmarks.chair import Chair
from shellv_core.evaluation.report import Span, highlight, summarize
from shellv_core.evaluation.yes_no import score_yes_no


def results(**differences):
    """Results in which the candidate differs so much from the other model, by metric."""
    block = score_yes_no({"a": True, "b": False}, {"a": True, "b": False})
    comparison = {
        metric: {"difference": value, "low": value - 0.02, "high": value + 0.02, "p_value": 0.5}
        for metric, value in differences.items()
    }
    return {
        "models": {"candidate": {"pope": {"random": block}, "pope_blind": {"random": block}}},
        "comparisons": {"candidate_blind": comparison, "without_hacl": comparison},
    }


@pytest.mark.parametrize(
    ("metric", "difference", "blind", "other"),
    [
        ("pope_random_accuracy", 0.1, ("good", "The pictures help"), ("good", "is better in")),
        ("pope_random_accuracy", 0.0, ("bad", "No measurable use"), ("open", "is not measurably different in")),
        ("pope_random_accuracy", -0.1, ("bad", "The pictures harm"), ("bad", "is worse in")),
        ("chair_instance_rate", -0.1, ("good", "The pictures help"), ("good", "is better in")),
        ("chair_instance_rate", 0.1, ("bad", "The pictures harm"), ("bad", "is worse in")),
    ],
)
def test_summary_says_whichever_wins(metric, difference, blind, other):
    findings = summarize(results(**{metric: difference}))
    assert [kind for kind, _ in findings] == [blind[0], other[0]]
    assert blind[1] in findings[0][1]
    assert other[1] in findings[1][1]


def test_mixed_results_are_told_both_ways():
    _, sentence = summarize(results(hal_eval_event_accuracy=0.1, pope_popular_accuracy=-0.1))[-1]
    assert "better in Hal-Eval event accuracy; worse in POPE popular accuracy" in sentence


def test_highlight():
    chair = Chair([{"image": "a.jpg", "objects": ["dog"]}])
    assert highlight(chair, "a.jpg", "A dog, no cat.") == [
        Span("A "),
        Span("dog", "right"),
        Span(", no "),
        Span("cat", "wrong"),
        Span("."),
    ]
    assert highlight(chair, "a.jpg", "") == []


def test_chart_is_valid_xml_with_escaped_labels():
    from xml.etree import ElementTree

    series = [Series("<a> & b", "#123456", [Bar(0.5, 0.4, 0.6), Bar(0.0)])]
    chart = bar_chart('a "title"', ["x<y", "z"], series, chance=0.5)
    texts = ["".join(element.itertext()) for element in ElementTree.fromstring(chart).iter()]
    assert "<a> & b, x<y: 50.0 % (40.0 to 60.0)" in texts
