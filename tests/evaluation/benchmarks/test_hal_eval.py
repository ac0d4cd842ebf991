import pytest

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmarks.hal_eval import TYPES, HalEval
from shellv_core.evaluation.rows import read_rows

NAMES = tuple(f"{name} Hallucination" for name in ("Objective", "Attributive", "Spatial Relationship", "Event"))


def item(image="a.jpg", **change):
    hallucinated = [{"type": name, "caption": f"false {name}", "from": "test"} for name in NAMES]
    return {"image": image, "caption": "true ", "hal_caption": hallucinated, **change}


def perfect(benchmark):
    ids = [question.question_id for question in benchmark.questions]
    return {key: "yes" if key.endswith("/gt") else "no" for key in ids}


def test_questions():
    benchmark = HalEval([item()])
    assert [question.question_id for question in benchmark.questions] == [
        f"a.jpg/{kind}" for kind in ("gt", "object", "attribute", "relation", "event")
    ]
    assert benchmark.questions[0].prompt.startswith("```true```. Does the caption")


def test_ids_prefer_the_key_and_number_repetitions():
    rows = [item(None, image_path="/x/1.jpg", key="1"), item(None, image_path="/x/1.jpg", key="1"), item("b.jpg")]
    gt = [question.question_id for question in HalEval(rows).questions if question.question_id.endswith("/gt")]
    assert gt == ["1/gt", "1#2/gt", "b.jpg/gt"]


def test_a_caption_with_braces_is_taken_as_it_is():
    benchmark = HalEval([item(caption="a {caption} {x}")], prompt="Is it {caption}?")
    assert benchmark.questions[0].prompt == "Is it a {caption} {x}?"


def test_scores_by_type():
    benchmark = HalEval([item("a.jpg"), item("b.jpg")])
    answers = perfect(benchmark)
    answers["a.jpg/object"] = "yes"
    answers["b.jpg/event"] = "The description is accurate"
    scores = benchmark.score(answers)
    assert (scores["object"]["accuracy"], scores["object"]["precision"]) == (3 / 4, 2 / 3)
    assert scores["attribute"]["accuracy"] == scores["relation"]["accuracy"] == 1
    event = scores["event"]
    assert (event["accuracy"], event["num_unparsed"], event["parsed_only"]["accuracy"]) == (3 / 4, 1, 1)
    assert event["author_rule"]["num_unparsed"] == 1


def test_an_empty_caption_is_left_out_with_its_pair():
    row = item()
    row["hal_caption"][0]["caption"] = ""
    benchmark = HalEval([row, item("b.jpg")])
    assert benchmark.num_empty_captions == 1
    scores = benchmark.score(perfect(benchmark))
    assert (scores["object"]["num_questions"], scores["event"]["num_questions"]) == (2, 4)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (item(caption=""), "item 1: needs image .* caption and a list hal_caption"),
        (item(hal_caption=[{"type": "Odd", "caption": "x"}]), "unknown hallucination type 'Odd'"),
        (item(hal_caption=[{"type": "event", "caption": "x"}] * 2), "two captions of type 'event'"),
    ],
)
def test_bad_items(row, message):
    with pytest.raises(EvaluationError, match=message):
        HalEval([row])


@pytest.mark.parametrize(("name", "num_empty"), [("in_domain", 0), ("out_of_domain", 2)])
def test_published_files(shared, name, num_empty):
    benchmark = HalEval(read_rows(shared / f"benchmarks/hal_eval/{name}_evaluation.json"))
    assert len(benchmark.questions) == 25000 - num_empty
    assert benchmark.num_empty_captions == num_empty
    answers = perfect(benchmark)
    scores = benchmark.score(dict(reversed(answers.items())))
    always = benchmark.score(dict.fromkeys(answers, "yes"))
    for kind in TYPES:
        assert scores[kind]["accuracy"] == scores[kind]["author_rule"]["accuracy"] == 1
        assert (always[kind]["accuracy"], always[kind]["recall"]) == (0.5, 1)
