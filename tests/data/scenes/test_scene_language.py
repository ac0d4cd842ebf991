from __future__ import annotations

import random
import re
from collections import Counter
from collections.abc import Iterator

import pytest

from shellv_core.data.samples import HALLUCINATION_TYPES
from shellv_core.data.scenes.config import ScenesConfig
from shellv_core.data.scenes.generate import SceneRequest, scene_record
from shellv_core.data.scenes.language import describe, hallucinate, phrase, short_caption, speak
from shellv_core.data.scenes.scene import Scene, sample_scene
from shellv_core.data.scenes.statistics import training_company
from shellv_core.data.scenes.vocabulary import CATEGORIES, COLORS, EVENTS, NUMBERS

CONFIG = ScenesConfig()
SINGULAR = {category.plural: category.name for category in CATEGORIES.values()} | {name: name for name in CATEGORIES}
NOUN = "|".join(sorted(map(re.escape, SINGULAR), key=len, reverse=True))
MENTION = re.compile(
    rf"\b(?:(a pair of|an?|{'|'.join(NUMBERS[1:])}) )?(?:({'|'.join(COLORS)}) )?({NOUN})\b", re.IGNORECASE
)


def mentions(text: str) -> Iterator[tuple[int | None, str | None, str]]:
    """(count, color, category) of each noun phrase; the count is None after "the"."""
    for number, color, noun in MENTION.findall(text):
        word = number.lower()
        count = NUMBERS.index(word) if word in NUMBERS else 1 if word else None
        yield count, color.lower() or None, SINGULAR[noun.lower()]


def faults(scene: Scene, text: str) -> set[str]:
    """Which kinds of statement in `text` the ground truth contradicts, read off the sentence itself."""
    objects = {item.category: item for item in scene.objects}
    found = set()
    for count, color, category in mentions(text):
        if category not in objects:
            found.add("object")
        elif count is not None and (count != objects[category].count or color != objects[category].color):
            found.add("attribute")
    names = [category for _, _, category in mentions(text)]
    if match := re.search(r"to the (left|right) of", text):
        pair = [name for name in names if name in objects][:2]
        if "object" not in found and scene.relation(pair[0], pair[1], "horizontal") != match[1]:
            found.add("relation")
    elif "object" not in found and scene.side(names[0]) != re.findall(r"on the (left|right) side", text)[0]:
        found.add("relation")
    event = next(key for key, words in EVENTS.items() if text.endswith(f"is {words}."))
    if "object" not in found and (names[-1] != scene.focus or event != scene.event):
        found.add("event")
    return found


@pytest.fixture(scope="module")
def told() -> list[tuple[Scene, dict]]:
    return [
        scene_record(SceneRequest(CONFIG, 2, split, 400), index)
        for split in ("train", "validation")
        for index in range(400)
    ]


def test_true_captions_are_true_and_short(told: list[tuple[Scene, dict]]) -> None:
    for scene, record in told:
        assert faults(scene, record["caption"]) == set(), record["caption"]
        assert len(record["caption"].split()) <= 24
        assert record["caption"][0].isupper()
    assert sum(len(record["caption"].split()) for _, record in told) / len(told) < 19


def test_each_lie_is_false_in_its_own_way_only(told: list[tuple[Scene, dict]]) -> None:
    for scene, record in told:
        lies = record["hallucinated_captions"]
        assert [lie["type"] for lie in lies] == list(HALLUCINATION_TYPES)
        for lie in lies:
            assert faults(scene, lie["text"]) == {lie["type"]}, (record["caption"], lie)


def test_a_lie_differs_in_the_recorded_words_and_keeps_the_form(told: list[tuple[Scene, dict]]) -> None:
    for _, record in told:
        for lie in record["hallucinated_captions"]:
            assert lie["original"] != lie["replacement"]
            assert lie["original"] in record["caption"]
            assert lie["replacement"] in lie["text"]
            tail = len(record["caption"].split()) - len(lie["text"].split())
            assert abs(tail) <= 3 if lie["type"] == "object" else tail == 0


def test_lies_use_the_same_words_as_truths() -> None:
    """Without the picture, a word that only liars use would give them away."""
    company = training_company(CONFIG, 0, 1000).together
    true, false = Counter(), Counter()
    for index in range(1500):
        scene = sample_scene(CONFIG, 0, "train", index)
        rng = random.Random(index)
        description = describe(scene, rng)
        true.update(set(speak(description).lower().rstrip(".").split()))
        for lie in hallucinate(scene, description, company, rng):
            if lie.type != "object":
                false.update(dict.fromkeys(set(lie.text.lower().rstrip(".").split()), 1 / 3))
    for word in ("left", "right", "two", "three", *COLORS, "upside", "sideways", "upright", "high"):
        assert 0.8 < false[word] / true[word] < 1.25, word


def test_object_lies_name_the_usual_company() -> None:
    company = training_company(CONFIG, 0, 1000)
    suggested = uniform = 0.0
    for index in range(400):
        scene = sample_scene(CONFIG, 0, "train", index)
        rng = random.Random(index)
        lie = hallucinate(scene, describe(scene, rng), company.together, rng)[0]
        (name,) = {category for *_, category in mentions(lie.text)} - set(scene.categories)
        absent = set(CATEGORIES) - set(scene.categories)

        def weight(category: str, present: tuple[str, ...] = scene.categories) -> float:
            return sum(company.together[other].get(category, 0.0) for other in present)

        suggested += weight(name)
        uniform += sum(map(weight, absent)) / len(absent)
    assert suggested > 2 * uniform


def test_short_captions_name_everything(told: list[tuple[Scene, dict]]) -> None:
    for scene, _ in told[:200]:
        text = short_caption(scene, random.Random(0))
        expected = [(item.count, item.color, item.category) for item in scene.objects]
        assert list(mentions(text)) == expected


def test_phrases() -> None:
    from shellv_core.data.samples import SampleObject

    assert phrase(SampleObject("apple")) == "an apple"
    assert phrase(SampleObject("umbrella", color="red")) == "a red umbrella"
    assert phrase(SampleObject("knife", count=2)) == "two knives"
    assert phrase(SampleObject("scissors")) == "a pair of scissors"
