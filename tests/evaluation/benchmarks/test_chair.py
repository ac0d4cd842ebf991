import pytest

from shellv_core.data.objects import COCO_CLASSES, find_mentions
from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmarks.chair import AuthorsWords, Chair


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


SYNONYMS = """person, man, woman, baby, passenger
dog, puppy
bird
airplane, jet, plane
tie
toilet
chair, seat, stool
wine glass
hot dog
train
knife
"""


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Two men, women and a puppy", ["person", "person", "dog"]),
        ("a hot dog and hot dogs", ["hot dog", "hot dog"]),
        ("a baby bird by a baby", ["bird", "person"]),
        ("a passenger jet, a passenger", ["airplane", "person"]),
        ("bow ties at a toilet seat; a seat", ["tie", "toilet"]),
        ("wine glasses on seats, knives", ["wine glass", "chair", "knife"]),
        ("a train track", []),
    ],
)
def test_the_authors_words(text, expected):
    assert AuthorsWords(SYNONYMS).find(text) == expected


def test_the_authors_words_score_beside_ours():
    rows = [{"image": "a.jpg", "objects": ["dog"], "captions": ["A man walks a dog."]}]
    scores = Chair(rows, authors_words=AuthorsWords(SYNONYMS)).score({"a.jpg": "A pup, a woman, a train, a puppy."})
    # "pup" is none of the authors' words.
    assert (scores["instance_rate"], scores["num_mentions"]) == (1 / 4, 4)
    assert scores["author_rule"] == {"instance_rate": 1 / 3, "sentence_rate": 1, "recall": 1}
    with pytest.raises(EvaluationError, match="line 1: 'doog' is not one of COCO"):
        AuthorsWords("doog, dog")
