"""Synthetic answers to the authors' real files, through the command; the figures follow from the files' make-up."""

import json

import pytest

from shellv_core.cli import main
from shellv_core.evaluation.benchmarks.pope import SPLITS
from shellv_core.evaluation.rows import read_rows

HAL_EVAL_TYPES = ("object", "attribute", "relation", "event")


@pytest.fixture
def score(tmp_path, capsys):
    """Score rows, as they are and in every way that must change nothing; the scores."""

    def run(name, questions, rows, *options, variants=True):
        lines = [json.dumps(row) for row in rows]
        contents = ["\n".join(lines)]
        if variants:
            contents += ["\n".join(lines[::-1]), "\r\n".join(lines), "\ufeff" + json.dumps(rows)]
        seen = []
        for content in contents:
            (tmp_path / "answers").write_bytes(content.encode())
            given = [] if questions is None else ["--questions", str(questions)]
            code = main(["score", name, *given, "--answers", str(tmp_path / "answers"), *options])
            said = capsys.readouterr()
            assert code == 0, said.err
            seen.append(json.loads(said.out))
        assert all(each == seen[0] for each in seen)
        return seen[0]

    return run


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("keys", [("question_id", "text"), ("question", "answer")])
def test_pope(shared, score, split, keys):
    path = shared / f"benchmarks/pope/coco_pope_{split}.json"
    questions = read_rows(path)
    named = "question_id" if keys[0] == "question_id" else "text"

    def answers(say):
        return [{keys[0]: row[named], keys[1]: say(number, row)} for number, row in enumerate(questions)]

    # 1,500 of 3,000 are a yes.
    yes = score("pope", path, answers(lambda *_: "Yes"))
    assert (yes["accuracy"], yes["precision"], yes["recall"], yes["yes_ratio"]) == (0.5, 0.5, 1, 1)
    assert yes["f1"] == pytest.approx(2 / 3)
    no = score("pope", path, answers(lambda *_: "No."))
    assert (no["accuracy"], no["precision"], no["recall"], no["f1"], no["yes_ratio"]) == (0.5, 0, 0, 0, 0)
    assert no["author_rule"]["accuracy"] == 0.5

    # Yes where it is right; NO, "Not sure" and "There isn't any." in turn for the rest.
    noes = iter(["NO", "Not sure", "There isn't any."] * 500)
    mixed = score("pope", path, answers(lambda _, row: "Yes, it is." if row["label"] == "yes" else next(noes)))
    assert (mixed["num_unparsed"], mixed["accuracy"], mixed["precision"], mixed["recall"]) == (500, 2500 / 3000, 1, 1)
    assert mixed["parsed_only"]["accuracy"] == 1
    # To the authors all three are a yes: "Not" in capitals, NO, isn't.
    assert mixed["author_rule"]["yes_ratio"] == 1
    assert mixed["author_rule"]["accuracy"] == 0.5

    if keys[0] == "question":
        return
    # The first 1,000 alone, all right.
    some = score("pope", path, answers(lambda _, row: row["label"])[:1000])
    assert (some["num_missing"], some["accuracy"], some["num_correct"]) == (2000, 1000 / 3000, 1000)


def test_pope_rows_of_llava(shared, score, tmp_path):
    """LLaVA numbers the questions of all splits together, with its prompt's suffix."""
    asked, answers, number = [], [], 0
    for split in SPLITS:
        for row in read_rows(shared / f"benchmarks/pope/coco_pope_{split}.json"):
            suffix = "\nAnswer the question using a single word or phrase."
            asked.append(
                {"question_id": number, "image": row["image"], "text": row["text"] + suffix, "category": split}
            )
            # Right in the popular split alone.
            text = row["label"].title() if split == "popular" else "Yes" if row["label"] == "no" else "No"
            answers.append({"question_id": number, "prompt": row["text"] + suffix, "text": text, "model_id": "x"})
            number += 1
    ours = tmp_path / "llava_pope_test.jsonl"
    ours.write_text("".join(json.dumps(row) + "\n" for row in asked))
    for split in SPLITS:
        path = shared / f"benchmarks/pope/coco_pope_{split}.json"
        scores = score("pope", path, answers, "--llava-questions", str(ours), variants=split == "random")
        assert (scores["accuracy"], scores["num_missing"]) == (float(split == "popular"), 0)


def test_pope_question_rows_that_lack_one_or_fit_twice(shared, score, tmp_path, capsys):
    path = shared / "benchmarks/pope/coco_pope_random.json"
    rows = [{"question": row["text"], "answer": row["label"]} for row in read_rows(path)]
    scores = score("pope", path, rows[:100] + rows[101:], variants=False)
    assert (scores["num_missing"], scores["num_correct"]) == (1, 2999)
    for changed, message in (
        ([rows[0], {"question": "Is there a unicorn?", "answer": "no"}], "row 2: 'Is there a unicorn?'"),
        ([rows[2]], "more than one question"),
    ):
        (tmp_path / "bad").write_text(json.dumps(changed))
        assert main(["score", "pope", "--questions", str(path), "--answers", str(tmp_path / "bad")]) == 1
        assert message in capsys.readouterr().err


@pytest.mark.parametrize(("name", "empty"), [("in_domain", 0), ("out_of_domain", 2)])
def test_hal_eval(shared, score, tmp_path, name, empty):
    path = shared / f"benchmarks/hal_eval/{name}_evaluation.json"
    items = read_rows(path)

    def predictions(*texts):
        return [{"predict": list(texts), "result": [0] * 5} for _ in items]

    # Predict lists are in the items' order: true caption, relation, object, attribute, event.
    always = score("hal-eval", path, predictions(*["yes"] * 5), variants=False)
    for kind in HAL_EVAL_TYPES:
        assert (always[kind]["accuracy"], always[kind]["recall"], always[kind]["yes_ratio"]) == (0.5, 1, 1)
    assert sum(10000 - always[kind]["num_questions"] for kind in HAL_EVAL_TYPES) == 2 * empty
    mixed = score("hal-eval", path, predictions("yes", "yes", "no", "It is accurate", "Another match"), variants=False)
    assert (mixed["relation"]["accuracy"], mixed["relation"]["precision"]) == (0.5, 0.5)
    assert (mixed["object"]["accuracy"], mixed["object"]["precision"]) == (1, 1)
    half = mixed["attribute"]["num_questions"] // 2
    for kind in ("attribute", "event"):
        assert (mixed[kind]["num_unparsed"], mixed[kind]["accuracy"]) == (mixed[kind]["num_questions"] // 2, 0.5)
        assert mixed[kind]["parsed_only"]["accuracy"] == 1
    # To the authors "Another match" holds a no, and "It is accurate" says neither.
    assert (mixed["event"]["author_rule"]["accuracy"], mixed["event"]["author_rule"]["num_unparsed"]) == (1, 0)
    assert mixed["attribute"]["author_rule"]["num_unparsed"] == half
    # One row less, and nothing can be said.
    (tmp_path / "bad").write_text(json.dumps(predictions(*["no"] * 5)[1:]))
    assert main(["score", "hal-eval", "--questions", str(path), "--answers", str(tmp_path / "bad")]) == 1


def test_amber_questions(shared, score):
    folder = shared / "benchmarks/amber"
    annotations = {row["id"]: row for row in json.loads((folder / "annotations.json").read_text())}
    asked = [key for key, row in annotations.items() if row["type"] != "generative"]
    path = folder / "query_all.json"
    # Of 14,216 questions 4,924 + 689 and half of 7,628 are a no: 9,427.
    noes = 4924 + 689 + 7628 // 2
    no = score("amber", path, [{"id": key, "response": "No"} for key in asked])["discriminative"]
    assert (no["all"]["num_questions"], no["all"]["num_correct"], no["all"]["recall"]) == (14216, noes, 1)
    assert no["all"]["precision"] == no["all"]["accuracy"] == pytest.approx(noes / 14216)
    assert (no["existence"]["precision"], no["existence"]["recall"]) == (1, 1)
    assert no["attribute"]["accuracy"] == no["attribute_number"]["accuracy"] == 0.5
    assert no["relation"]["accuracy"] == 689 / 1664
    # Rounded precision 66.3 and recall 100; of existence 100 and 100, over 2.001.
    assert no["all"]["author_rule"] == {"accuracy": 66.3, "precision": 66.3, "recall": 100.0, "f1": 79.7}
    assert no["existence"]["author_rule"]["f1"] == 100.0

    yes = score("amber", path, [{"id": key, "response": "Yes, it is."} for key in asked], variants=False)
    yes = yes["discriminative"]
    assert (yes["all"]["num_correct"], yes["all"]["recall"], yes["all"]["precision"]) == (14216 - noes, 0, 0)
    assert yes["relation"]["accuracy"] == 975 / 1664
    # Not the very text Yes.
    assert yes["all"]["author_rule"]["accuracy"] == 0
    right = [{"id": key, "response": annotations[key]["truth"].title()} for key in asked]
    perfect = score("amber", path, right, variants=False)["discriminative"]
    assert all(perfect[name]["accuracy"] == 1 for name in perfect)
    assert perfect["all"]["author_rule"]["f1"] == 100.0
    some = score("amber", path, right[:7108], variants=False)["discriminative"]["all"]
    assert (some["num_missing"], some["num_correct"]) == (7108, 7108)
    assert some["author_rule"]["accuracy"] == 100.0


def test_amber_descriptions(shared, score):
    folder = shared / "benchmarks/amber"
    rows = [row for row in json.loads((folder / "annotations.json").read_text()) if row["type"] == "generative"]

    def describe(say, variants=False):
        said = [{"id": row["id"], "response": say(row)} for row in rows]
        return score("amber", folder / "query_all.json", said, variants=variants)

    truth = describe(lambda row: f"There is a {', a '.join(row['truth'])}.", variants=True)["generative"]
    assert (truth["cover"], truth["chair"], truth["hal"], truth["cog"]) == (100, 0, 0, 0)
    assert truth["num_responses"] == 1004
    # The authors' scorer credits associations first: 93.3 for the same text.
    assert truth["author_rule"] == {"chair": 0.0, "cover": 93.3, "hal": 0.0, "cog": 0.0}
    nothing = describe(lambda _: "")["generative"]
    assert (nothing["cover"], nothing["chair"], nothing["hal"], nothing["num_without_nouns"]) == (0, 0, 0, 1004)
    likely = describe(lambda row: " and ".join(row["hallu"]))["generative"]
    # Some likely words go with an object that is there; a safe word is never held against a text.
    relations = json.loads((folder / "relation.json").read_text())
    safe = (folder / "safe_words.txt").read_text().split()
    imagined = [
        word
        for row in rows
        for word in row["hallu"]
        if word not in safe and all(word != name and word not in relations[name] for name in row["truth"])
    ]
    assert likely["num_nouns"] == sum(len(row["hallu"]) for row in rows) == 4924
    assert (likely["num_hallucinated_nouns"], likely["cog"]) == (len(imagined), 100 * len(imagined) / 4924)


def test_qa_review(shared, score):
    questions = shared / "benchmarks/qa90/qa90_questions.jsonl"
    categories = {row["question_id"]: row["category"] for row in read_rows(questions)}
    assert sorted(categories.values()) == ["complex"] * 30 + ["conv"] * 30 + ["detail"] * 30
    # The reference gets 8 always; the model 9, 8 and 4 in turn by category; one review cannot be read.
    second = {"conv": 9, "detail": 8, "complex": 4}
    rows = [
        {
            "id": number,
            "question_id": key,
            "category": category,
            "content": f"8 {second[category]}\nBecause.",
            "tuple": [8.0, second[category]],
        }
        for number, (key, category) in enumerate(categories.items())
    ]
    rows[0] |= {"content": "Both are fine.", "tuple": [-1, -1]}
    assert rows[0]["category"] == "conv"
    vicuna = [
        {"review_id": "x", "question_id": row["question_id"], "text": row["content"], "score": row["tuple"]}
        for row in rows
    ]
    for given in (rows, vicuna):
        scores = score("qa-review", questions, given)
        conv = scores["conv"]
        assert (conv["mean_first"], conv["mean_second"], conv["relative_score"]) == (8, 9, 112.5)
        assert (conv["win"], conv["tie"], conv["loss"], conv["num_unparsed"], conv["num_reviews"]) == (29, 0, 0, 1, 30)
        # (8 * 29 - 1) / 30 = 7.7 and (9 * 29 - 1) / 30 = 8.667.
        assert conv["author_rule"] == {"mean_first": 7.7, "mean_second": 8.667, "relative_score": 112.6}
        assert (scores["detail"]["relative_score"], scores["detail"]["tie"]) == (100, 30)
        assert (scores["complex"]["relative_score"], scores["complex"]["loss"]) == (50, 30)
        # (29 * 9 + 30 * 8 + 30 * 4) / (89 * 8) = 621 / 712.
        assert (scores["all"]["relative_score"], scores["all"]["num_unparsed"]) == (87.2, 1)
    # Without the question file the reviews' own categories count.
    assert score("qa-review", None, rows)["conv"]["win"] == 29
    missing = score("qa-review", questions, rows[3:])["all"]
    assert (missing["num_missing"], missing["num_reviews"], missing["num_unparsed"]) == (3, 87, 0)
