import itertools
import json

import pytest

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmarks import find
from shellv_core.evaluation.benchmarks.pope import SPLITS, Pope
from shellv_core.evaluation.rows import read_rows


def rows(labels):
    return [
        {"question_id": number, "image": "a.jpg", "text": f"Is there a thing {number}?", "label": label}
        for number, label in enumerate(labels, start=1)
    ]


def test_questions_and_suffix():
    pope = Pope(rows(["yes", "no"]), "popular", suffix="\nAnswer briefly.")
    assert pope.key == ("pope", "popular")
    assert pope.questions[0].prompt == "Is there a thing 1?\nAnswer briefly."
    assert pope.truth == {"1": True, "2": False}


def test_order_of_answers_does_not_matter():
    pope = Pope(rows(["yes", "no", "yes", "no", "no"]))
    answers = {"1": "yes", "2": "no", "3": "no", "4": "", "5": "no"}
    expected = pope.score(answers)
    assert expected["accuracy"] == 3 / 5
    for order in itertools.permutations(answers.items()):
        assert pope.score(dict(order)) == expected


def test_missing_and_unknown_answers_are_counted():
    scores = Pope(rows(["yes", "no", "no"])).score({"1": "yes", "77": "no"})
    assert (scores["num_missing"], scores["num_unknown"], scores["accuracy"]) == (2, 1, 1 / 3)


def test_empty_answers_are_no_yes():
    scores = Pope(rows(["yes", "no"])).score({"1": "", "2": ""})
    assert (scores["yes_ratio"], scores["num_unparsed"], scores["accuracy"]) == (0, 2, 0)
    assert scores["author_rule"]["yes_ratio"] == 1


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label": "maybe"}, "row 2: label 'maybe' is neither"),
        ({"question_id": 1}, "row 2: question_id '1' comes twice"),
    ],
)
def test_bad_questions(change, message):
    first, second = rows(["yes", "no"])
    with pytest.raises(EvaluationError, match=message):
        Pope([first, {**second, **change}])


def test_incomplete_question_and_empty_file():
    with pytest.raises(EvaluationError, match="row 1: lacks image, label"):
        Pope([{"question_id": 1, "text": "?"}])
    with pytest.raises(EvaluationError, match="holds no questions"):
        Pope([])


@pytest.mark.parametrize("split", SPLITS)
def test_published_files(shared, split):
    pope = Pope(read_rows(shared / f"benchmarks/pope/coco_pope_{split}.json"), split)
    assert (len(pope.questions), len({question.image for question in pope.questions})) == (3000, 500)
    perfect = {key: "Yes" if label else "No" for key, label in pope.truth.items()}
    assert pope.score(perfect)["accuracy"] == 1
    assert pope.score(dict(reversed(perfect.items())))["accuracy"] == 1
    always_yes = pope.score(dict.fromkeys(perfect, "Yes"))
    assert (always_yes["accuracy"], always_yes["recall"], always_yes["yes_ratio"]) == (0.5, 1, 1)
    assert always_yes["f1"] == pytest.approx(2 / 3)


@pytest.mark.parametrize("source", ["coco_pope_popular", "aokvqa_pope_seem_popular", "gqa_pope_seem_popular"])
def test_files_of_all_sources_name_their_split(tmp_path, source):
    """COCO's files are JSON Lines, those of A-OKVQA and GQA arrays."""
    content = [json.dumps(row) for row in rows(["yes", "no"])]
    text = "\n".join(content) if source.startswith("coco") else f"[{', '.join(content)}]"
    (tmp_path / f"{source}.json").write_text(text)
    pope = find("pope").open(tmp_path / f"{source}.json")
    assert (pope.key, pope.truth) == (("pope", "popular"), {"1": True, "2": False})
    assert find("pope").open(tmp_path / f"{source}.json", split="random").key == ("pope", "random")
