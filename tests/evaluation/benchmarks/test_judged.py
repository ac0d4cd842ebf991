"""Benchmarks that a judge reads: what it is asked, and how its words are scored."""

import json

import pytest

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import judge_answers
from shellv_core.evaluation.benchmarks.hal_eval import HalEvalGenerative
from shellv_core.evaluation.benchmarks.mmhal import MmHal, parse_rating
from shellv_core.evaluation.benchmarks.qa_review import QaReview, parse_review, read_contexts, read_instructions
from shellv_core.evaluation.rows import index_answers, read_rows
from tests.evaluation.benchmarks.samples import MMHAL


class Judge:
    """Says what it is told to by question id, and remembers what it was asked; it fails where it is told nothing."""

    def __init__(self, words):
        self.words = words
        self.asked = []

    def __call__(self, questions):
        self.asked += questions
        return {each.question_id: self.words[each.question_id] for each in questions if each.question_id in self.words}


def mmhal():
    return MmHal(MMHAL.files["responses.json"])


def test_a_judge_that_fails_leaves_rows_unjudged():
    benchmark = mmhal()
    judge = Judge({"0": "Rating: 6", "2": "Rating: 1"})
    judgments = judge_answers(benchmark, {"0": "A {dog}.", "1": "A cat.", "2": "{content}"}, judge)
    assert [each.question_id for each in judge.asked] == ["0", "1", "2"], "each once, even where it fails"
    assert all("What the image shows: dog, ball\n" in each.prompt for each in judge.asked)
    assert "The model's answer: A {dog}.\n" in judge.asked[0].prompt
    assert "The model's answer: {content}\n" in judge.asked[2].prompt
    assert {each.image for each in judge.asked} == {""}
    scores = benchmark.score(judgments)
    assert (scores["mean_score"], scores["num_unjudged"], scores["num_judged"]) == (3.5, 1, 2)


def test_a_judges_prompt_of_ones_own():
    rows = MMHAL.files["responses.json"]
    (question,) = MmHal(rows, judge_prompt='{question} {"a": {answer}} {truth} {content}').judge_questions(
        {"0": "x {truth}"}, {}
    )
    assert question.prompt == 'What is it? {"a": x {truth}} A dog. dog, ball'
    with pytest.raises(EvaluationError, match=r"no \{truth\}, \{answer\} in it"):
        MmHal(rows, judge_prompt="{question} {content}")


@pytest.mark.parametrize(
    ("text", "rating"),
    [
        ("Rating: 3", 3),
        ("... so it hallucinates.\n**Rating**: 2", 2),
        ("Rating: **5**, very informative", 5),
        ("rating=0", 0),
        ("Rating: 6\nAgain, rating: 6", 6),
        ("Rating: 1 or rating: 2", None),
        ("Rating: 7", None),
        ("Rating: 35", None),
        ("Rating: 4.5", None),
        ("A 3.", None),
        ("", None),
    ],
)
def test_ratings(text, rating):
    assert parse_rating(text) == rating


def test_completions_of_the_authors_judge(tmp_path):
    texts = ["Rating: 4", "Rating: 0, rating: 1", "Rating: 2"]
    completions = [{"id": "c", "choices": [{"message": {"role": "assistant", "content": text}}]} for text in texts]
    for rows in (completions, [json.dumps(row) for row in completions]):
        (tmp_path / "eval.json").write_text(json.dumps(rows))
        scores = mmhal().score(mmhal().read_answers(tmp_path / "eval.json"))
        assert (scores["mean_score"], scores["num_unparsed"]) == (3, 1)
        assert scores["author_rule"]["mean_score"] == 2
        assert scores["author_rule"]["hallucination_rate"] == 2 / 3
    for rows, message in (
        (completions[1:], "2 completions for 3 questions"),
        ([{"choices": []}] * 3, "row 1: is no chat completion"),
        (MMHAL.files["responses.json"], "a model's answers and no judgments"),
    ):
        (tmp_path / "eval.json").write_text(json.dumps(rows))
        with pytest.raises(EvaluationError, match=message):
            mmhal().read_answers(tmp_path / "eval.json")


def test_types_follow_the_authors_order_where_the_file_names_none():
    rows = [{**row, "question_type": ""} for row in MMHAL.files["responses.json"]]
    scores = MmHal(rows).score({"0": "Rating: 1", "1": "Rating: 2", "2": "Rating: 3"})
    assert scores["mean_by_type"] == {"attribute": 1, "adversarial": 2, "comparison": 3}


def test_types_are_asked_only_of_what_hallucinates():
    benchmark = HalEvalGenerative(["a.jpg", "b.jpg", "c.jpg", "d.jpg"])
    judge = Judge({"a.jpg/hallucinated": "Yes.", "b.jpg/hallucinated": "No.", "a.jpg/types": "Event: additional"})
    answers = {"a.jpg": "A {caption}.", "b.jpg": "A dog.", "c.jpg": "A cat."}
    scores = benchmark.score(judge_answers(benchmark, answers, judge))
    assert [each.question_id for each in judge.asked] == [
        "a.jpg/hallucinated", "b.jpg/hallucinated", "c.jpg/hallucinated", "a.jpg/types",
    ]  # fmt: skip
    assert judge.asked[0].prompt.startswith("Caption: A {caption}.\n")
    assert (judge.asked[3].image, judge.asked[3].prompt.split("\n")[2]) == ("a.jpg", "Yes.")
    assert (scores["accuracy"], scores["num_judged"], scores["num_unjudged"]) == (0.5, 2, 2)
    assert scores["type_shares"] == {"object": 0, "relation": 0, "attribute": 0, "event": 1}


def test_no_description_hallucinates():
    scores = HalEvalGenerative(["a.jpg"]).score({"a.jpg/hallucinated": "No"})
    assert (scores["accuracy"], scores["type_shares"]["object"], scores["num_hallucinated"]) == (1, 0, 0)


@pytest.mark.parametrize(
    ("text", "scores"),
    [
        ("8 7", (8, 7)),
        ("8.5 9\nBoth", (8.5, 9)),
        ("\n 10, 9 \nBoth", (10, 9)),
        ("8  9", (8, 9)),
        ("8/10 9/10", (8, 9)),
        ("Assistant 1: 8, assistant 2: 9", None),
        ("8", None),
        ("80 90", None),
        ("-1 -1", None),
        ("Both are good.\n8 9", None),
        ("", None),
    ],
)
def test_reviews(text, scores):
    assert parse_review(text) == scores


def test_the_judge_reads_context_question_and_both_answers(shared):
    folder = shared / "benchmarks/qa90"
    benchmark = QaReview(
        read_rows(folder / "qa90_questions.jsonl"),
        index_answers(read_rows(folder / "qa90_gpt4_answer.jsonl")),
        read_contexts(folder / "caps_boxes_coco2014_val_80.jsonl"),
        read_instructions(folder / "rule.json"),
    )
    (question,) = benchmark.judge_questions({"1": "Two suitcases."}, {})
    assert question.question_id == "1"
    order = [
        "[Context]\n",
        "suitcase: [",
        "[Question]\nAnalyze the image in a comprehensive and detailed manner.",
        "[Assistant 1]\nThe image features two antique suitcases",
        "[Assistant 2]\nTwo suitcases.\n\n[End of Assistant 2]",
        "[System]\nWe would like to request",
    ]
    places = [question.prompt.index(part) for part in order]
    assert places == sorted(places)
    asked = benchmark.judge_questions({each.question_id: "x" for each in benchmark.questions}, {})
    assert len(asked) == 90
    judged = judge_answers(benchmark, {"1": "x", "2": "y"}, Judge({"1": "8 6\n.", "2": "no"}))
    scores = benchmark.score(judged)
    assert (scores["detail"]["relative_score"], scores["complex"]["num_unparsed"]) == (75, 1)
    assert scores["all"]["num_missing"] == 88


def test_a_review_without_context_is_refused():
    benchmark = QaReview([{"question_id": 1, "image": "a.jpg", "text": "?", "category": "conv"}], {"1": "x"})
    with pytest.raises(EvaluationError, match=r"question '1' about 'a\.jpg' has no context"):
        benchmark.judge_questions({"1": "y"}, {})


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question_id": 1, "category": "x"}, "row 1: needs a tuple or score"),
        ({"question_id": 1, "tuple": [1]}, r"row 1: tuple or score \[1\] is no list of two numbers"),
        ({"question_id": 1, "score": ["8", "9"]}, "is no list of two numbers"),
    ],
)
def test_bad_reviews(tmp_path, row, message):
    (tmp_path / "r.jsonl").write_text(json.dumps(row))
    with pytest.raises(EvaluationError, match=message):
        QaReview().read_answers(tmp_path / "r.jsonl")
