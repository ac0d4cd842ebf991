import pytest

from shellv_core.data.objects import COCO_CLASSES, find_mentions
from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmarks.chair import Chair


def classes(text):
    return [mention.category for mention in find_mentions(text)]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("A hot dog beside a dog.", ["hot dog", "dog"]),
        ("Two people, three mice, knives, wine glasses and buses", ["person", "mouse", "knife", "wine glass", "bus"]),
        ("a teddy bear, a polar bear", ["teddy bear", "bear"]),
        ("a baby elephant and an adult zebra", ["elephant", "zebra"]),
        ("a bow tie and a passenger jet", ["tie", "airplane"]),
        ("a man on the train tracks behind home plate", ["person"]),
        ("a motor bike near a stop light", ["motorcycle", "traffic light"]),
        ("an orange cat eats an orange and an orange", ["cat", "orange", "orange"]),
        ("the toilet has its seat up", ["toilet"]),
        ("a seat by the window", ["chair"]),
        ("A toilet seat", ["toilet"]),
        ("dogs, a dog and the DOG's tail", ["dog", "dog"]),
        ("skis and scissors on a television", ["skis", "scissors", "tv"]),
        ("the sky over green grass", []),
        ("", []),
    ],
)
def test_mentions(text, expected):
    assert classes(text) == expected


def test_every_class_is_found_in_singular_and_plural():
    assert len(COCO_CLASSES) == 80
    for name in COCO_CLASSES:
        assert classes(f"There is a {name}.") == [name]


def test_mentions_tell_where_they_are():
    text = "A red Hot Dog, 2 cups."
    assert [text[mention.start : mention.end] for mention in find_mentions(text)] == ["Hot Dog", "cups"]


def scenes():
    return [
        {"image": "a.jpg", "objects": ["dog"], "captions": ["A dog chases a ball."]},
        {"image": "b.jpg", "objects": ["car", "person"], "captions": []},
    ]


def test_scores_by_hand():
    chair = Chair(scenes())
    assert chair.present["a.jpg"] == {"dog", "sports ball"}, "objects and those of the true captions"
    scores = chair.score({"a.jpg": "A dog and a cat, a dog and a cat.", "b.jpg": "A man."})
    assert (scores["num_mentions"], scores["num_hallucinated_mentions"]) == (5, 2), "mentions are not made unique"
    assert scores["instance_rate"] == 2 / 5
    assert scores["sentence_rate"] == 1 / 2
    assert scores["recall"] == 2 / 4
    assert scores["num_missing"] == 0


def test_silence_is_counted():
    scores = Chair(scenes()).score({"a.jpg": ""})
    assert (scores["instance_rate"], scores["recall"]) == (0, 0)
    assert (scores["num_without_objects"], scores["num_missing"]) == (1, 1)


def test_outcomes_sum_to_the_rate():
    chair = Chair(scenes())
    parts = chair.outcomes({"a.jpg": "A dog and a cat", "b.jpg": "A bus"})["chair_instance_rate"]
    assert parts == {"a.jpg": (1, 2), "b.jpg": (1, 1)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"image": "a.jpg", "objects": ["dogg"]}], "'dogg' is not one of COCO's 80 classes; did you mean 'dog'"),
        ([{"image": "a.jpg"}], "needs image and a list objects"),
        ([{"image": "a.jpg", "objects": []}] * 2, "image 'a.jpg' comes twice"),
        ([], "holds no scenes"),
    ],
)
def test_bad_scenes(rows, message):
    with pytest.raises(EvaluationError, match=message):
        Chair(rows)
