from __future__ import annotations

import re
from collections import Counter, defaultdict

import pytest

from shellv_core.data.scenes.config import ScenesConfig
from shellv_core.data.scenes.generate import SceneRequest, scene_record
from shellv_core.data.scenes.scene import Scene
from shellv_core.data.scenes.statistics import training_company
from shellv_core.data.scenes.vocabulary import CATEGORIES, EVENTS, NUMBERS

CONFIG = ScenesConfig()
Pairs = list[tuple[str, str]]


def pairs(conversation: list[dict[str, str]]) -> Pairs:
    assert [turn["from"] for turn in conversation] == ["human", "gpt"] * (len(conversation) // 2)
    texts = [turn["value"] for turn in conversation]
    assert texts[0].startswith("<image>\n")
    assert sum(text.count("<image>") for text in texts) == 1
    return list(zip([texts[0].removeprefix("<image>\n"), *texts[2::2]], texts[1::2], strict=True))


@pytest.fixture(scope="module")
def asked() -> list[tuple[Scene, dict, list[Pairs]]]:
    rows = [scene_record(SceneRequest(CONFIG, 1, "train", 1000), index) for index in range(1000)]
    return [
        (scene, record, [pairs(item) for item in (record["conversations"], *record["more_conversations"])])
        for scene, record in rows
    ]


def existence(conversations: list[Pairs]) -> list[list[tuple[str, str]]]:
    pattern = re.compile(r"Is there an? (.+) in the image\?$")
    found = [[(pattern.match(q), answer) for q, answer in items] for items in conversations]
    return [[(match[1], answer) for match, answer in items if match] for items in found if items[0][0]]


def test_existence_answers_are_true_and_asked_once(asked: list[tuple[Scene, dict, list[Pairs]]]) -> None:
    for scene, _, conversations in asked:
        found = existence(conversations)
        assert len(found) == CONFIG.existence_conversations
        for items in found:
            assert 1 <= len(items) <= CONFIG.existence_turns
            names = [name for name, _ in items]
            assert len(set(names)) == len(names)
            assert all((answer == "Yes") == (name in scene.categories) for name, answer in items)
            assert {answer for _, answer in items} <= {"Yes", "No"}


def test_earlier_answers_say_nothing_about_the_next(asked: list[tuple[Scene, dict, list[Pairs]]]) -> None:
    after: dict[tuple[int, int], Counter[str]] = defaultdict(Counter)
    for *_, talk in asked:
        for items in existence(talk):
            answers = [answer for _, answer in items]
            for turn, answer in enumerate(answers):
                after[answers[:turn].count("Yes"), answers[:turn].count("No")][answer] += 1
    often = {history: counts for history, counts in after.items() if counts.total() >= 200}
    assert len(often) > 8
    for history, counts in often.items():
        # Four standard deviations of a fair coin.
        assert abs(counts["Yes"] / counts.total() - 0.5) < 2 / counts.total() ** 0.5, history


def test_neither_answer_nor_category_gives_yes_away(asked: list[tuple[Scene, dict, list[Pairs]]]) -> None:
    answers = Counter(answer for *_, talk in asked for items in existence(talk) for _, answer in items)
    assert abs(answers["Yes"] / answers.total() - 0.5) < 0.02
    by_name: dict[str, Counter[str]] = defaultdict(Counter)
    first: Counter[str] = Counter()
    for *_, talk in asked:
        for items in existence(talk):
            first[items[0][1]] += 1
            for name, answer in items:
                by_name[name][answer] += 1
    assert abs(first["Yes"] / first.total() - 0.5) < 0.04
    shares = [counts["Yes"] / counts.total() for counts in by_name.values() if counts.total() > 60]
    assert len(shares) > 40
    assert min(shares) > 0.25
    assert max(shares) < 0.75


def test_many_absent_objects_are_the_usual_company(asked: list[tuple[Scene, dict, list[Pairs]]]) -> None:
    company = training_company(CONFIG, 1, 1000)
    lift = []
    for scene, _, talk in asked[:300]:
        for items in existence(talk):
            for name in (name for name, answer in items if answer == "No"):
                near = max(company.together[other].get(name, 0.0) for other in scene.categories)
                lift.append(near > 2 * company.frequency[name])
    assert sum(lift) / len(lift) > 0.3


def test_answers_about_attributes_follow_from_the_scene(asked: list[tuple[Scene, dict, list[Pairs]]]) -> None:
    names = {category.plural: name for name, category in CATEGORIES.items()} | {name: name for name in CATEGORIES}
    kinds: Counter[str] = Counter()
    yes: Counter[str] = Counter()
    for scene, _, talk in asked:
        objects = {item.category: item for item in scene.objects}
        for question, answer in (pair for items in talk for pair in items):
            if match := re.match(r"How many (.+) are there\?", question):
                assert answer == f"{NUMBERS[objects[names[match[1]]].count].capitalize()}."
                kinds["count"] += 1
            elif match := re.match(r"What color (?:is|are) the (.+)\?", question):
                assert answer.lower() == f"{objects[names[match[1]]].color}."
                kinds["color"] += 1
            elif (
                match := re.match(r"(?:Is|Are) the (.+) (\w+)\?", question)
                if question.startswith(("Is the", "Are"))
                else None
            ):
                truth, kind = _yes_or_no(scene, question, names)
                assert answer == ("Yes" if truth else "No"), (question, answer)
                kinds[kind] += 1
                yes[kind] += truth
    assert set(kinds) == {"count", "color", "is_color", "relation", "event"}
    for kind in ("is_color", "relation", "event"):
        assert 0.4 < yes[kind] / kinds[kind] < 0.6


def _yes_or_no(scene: Scene, question: str, names: dict[str, str]) -> tuple[bool, str]:
    objects = {item.category: item for item in scene.objects}
    for words, axis, value in (
        (" to the left of the ", "horizontal", "left"),
        (" to the right of the ", "horizontal", "right"),
        (" above the ", "vertical", "above"),
        (" below the ", "vertical", "below"),
    ):
        if words in question:
            first, second = question.removeprefix("Is the ").rstrip("?").split(words)
            return scene.relation(first, second, axis) == value, "relation"
    for key, words in EVENTS.items():
        if question.endswith(f" {words}?"):
            return scene.event == key and question == f"Is the {scene.focus} {words}?", "event"
    noun, color = question.split(" the ")[1].rstrip("?").rsplit(" ", 1)
    return objects[names[noun]].color == color, "is_color"


def test_descriptions_lists_and_matches(asked: list[tuple[Scene, dict, list[Pairs]]]) -> None:
    matches: Counter[str] = Counter()
    for scene, record, talk in asked:
        flat = dict(pair for items in talk for pair in items)
        assert flat["Describe the image in detail."] == record["caption"]
        assert flat["What objects are in the image?"].rstrip(".").lower().split(", ") == list(scene.categories)
        assert "Describe the image." in flat
        (match,) = [pair for pair in flat.items() if pair[0].startswith("```")]
        assert match[0].endswith('match the image exactly? If so, return "yes". If not, return "no".')
        assert (match[1] == "Yes") == (match[0].split("```")[1] == record["caption"])
        matches[match[1]] += 1
    assert abs(matches["Yes"] - matches["No"]) < 120


def test_named_questions_and_checklists_name_before_they_answer(asked: list[tuple[Scene, dict, list[Pairs]]]) -> None:
    counts: Counter[str] = Counter()
    for scene, record, talk in asked:
        assert len(record["tasks"]) == len(talk)
        for task, items in zip(record["tasks"], talk, strict=True):
            if task == "named":
                for question, answer in items:
                    name, said = answer.rsplit(" ", 1)
                    assert re.fullmatch(rf"Name it first\. Is there an? {name} in the image\?", question)
                    assert said == ("yes" if name in scene.categories else "no")
                    counts[said] += 1
            elif task == "checklist":
                ((question, answer),) = items
                names = question.removeprefix("Check the image for: ").removesuffix(".").split(", ")
                assert len(set(names)) == len(names) <= CONFIG.existence_turns
                said = ", ".join(f"{name} {'yes' if name in scene.categories else 'no'}" for name in names)
                assert answer == f"{said}."
                counts["checklist"] += 1
    assert counts["checklist"] == CONFIG.checklists * len(asked)
    assert abs(counts["yes"] / (counts["yes"] + counts["no"]) - 0.5) < 0.03


def test_numbers_of_questions_are_configured() -> None:
    config = ScenesConfig(
        named_conversations=0, checklists=0, existence_turns=2, attribute_questions=0, match_questions=0
    )
    _, record = scene_record(SceneRequest(config, 0, "train", 100), 0)
    assert len(record["conversations"]) <= 4
    assert len([record["conversations"], *record["more_conversations"]]) == 4
