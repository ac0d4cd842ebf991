import pytest

from shellv_core.evaluation.yes_no import (
    parse_hal_eval_author,
    parse_pope_author,
    parse_strict,
    score_yes_no,
    wilson_interval,
)


@pytest.mark.parametrize(
    ("text", "strict", "author"),
    [
        ("Yes", True, True),
        ("yes, there is a dog.", True, True),
        ("No.", False, False),
        ("No, there is not.", False, False),
        ("Yes, no doubt.", True, False),
        # The authors' rule takes all of these for a yes.
        ("NO", False, True),
        ("Nope", False, True),
        ("", None, True),
        ("No\n", False, True),
        ("There isn't a dog.", False, True),
        ("There isn\u2019t any.", False, True),
        ("Perhaps", None, True),
        ("A dog", None, True),
        # And these for a no.
        ("It's a dog; no.", False, False),
        ("Not sure", None, True),
        ("I do not know", None, False),
        ("The answer is yes.", True, True),
        ("It could be yes or no", None, False),
        ("There is no dog in it", False, False),
        ("I see none; another time. no", False, True),
    ],
)
def test_rules(text, strict, author):
    assert parse_strict(text) is strict
    assert parse_pope_author(text) is author


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("yes", True),
        ("It matches", True),
        ("No, it does not", False),
        ("yes, no", True),
        ("I know it matches", False),
        ("Another match", False),
        ("The description is accurate", None),
        ("", None),
    ],
)
def test_hal_eval_rule(text, label):
    assert parse_hal_eval_author(text) is label


def test_scores_by_hand():
    truth = {"a": True, "b": True, "c": True, "d": False, "e": False, "f": False, "g": True, "h": False}
    answered = {"a": True, "b": True, "c": False, "d": True, "e": False, "f": None, "g": None, "x": True}
    scores = score_yes_no(truth, answered)
    assert scores["counts"] == {
        "true_positives": 2,
        "false_positives": 1,
        "true_negatives": 1,
        "false_negatives": 1,
    }
    assert scores["accuracy"] == 3 / 8
    assert scores["precision"] == 2 / 3
    assert scores["recall"] == 2 / 4
    assert scores["f1"] == pytest.approx(4 / 7)
    assert scores["yes_ratio"] == 3 / 8
    assert (scores["num_unparsed"], scores["num_missing"], scores["num_questions"]) == (2, 1, 8)
    assert scores["parsed_only"]["accuracy"] == 3 / 5
    assert scores["parsed_only"]["recall"] == 2 / 3


def test_no_division_by_zero():
    scores = score_yes_no({"a": True, "b": False}, {"a": False, "b": False})
    assert (scores["precision"], scores["recall"], scores["f1"], scores["accuracy"]) == (0, 0, 0, 0.5)
    assert score_yes_no({}, {})["accuracy"] == 0


def test_wilson_interval():
    low, high = wilson_interval(8, 10)
    assert (low, high) == (pytest.approx(0.4902, abs=1e-4), pytest.approx(0.9433, abs=1e-4))
    assert wilson_interval(0, 0) == (0, 1)
    assert wilson_interval(10, 10)[1] == 1
