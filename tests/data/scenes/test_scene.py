from __future__ import annotations

import io
import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from shellv_core.data.scenes.artwork import FOLDER, pictures
from shellv_core.data.scenes.config import ScenesConfig
from shellv_core.data.scenes.generate import SceneRequest, scene_sample
from shellv_core.data.scenes.rendering import render, render_jpeg
from shellv_core.data.scenes.scene import Scene, sample_scene
from shellv_core.data.scenes.statistics import training_company
from shellv_core.data.scenes.vocabulary import CATEGORIES, COLORS, COMPANIONS, EVENTS, THEMES

CONFIG = ScenesConfig()
REQUEST = SceneRequest(CONFIG, seed=3, split="train", num_train=300)


@pytest.fixture(scope="module")
def scenes() -> list[Scene]:
    return [sample_scene(CONFIG, 3, split, index) for split in ("train", "validation") for index in range(300)]


def test_a_scene_is_a_function_of_seed_split_and_index() -> None:
    first = sample_scene(CONFIG, 0, "train", 7)
    assert first == sample_scene(CONFIG, 0, "train", 7)
    others = [sample_scene(CONFIG, 1, "train", 7), sample_scene(CONFIG, 0, "validation", 7)]
    assert all(first.instances != other.instances for other in others)
    assert render_jpeg(first, 160, 90) == render_jpeg(first, 160, 90)


def test_ground_truth_agrees_with_the_instances(scenes: list[Scene]) -> None:
    for scene in scenes:
        drawn = Counter(instance.category for instance in scene.instances)
        assert {item.category: item.count for item in scene.objects} == drawn
        assert 1 <= len(scene.instances) <= CONFIG.max_instances
        assert drawn[scene.focus] == 1
        (focus,) = (instance for instance in scene.instances if instance.category == scene.focus)
        for instance in scene.instances:
            half = instance.size / 2
            assert half - 0.01 <= instance.center_x <= 1 - half + 0.01
            assert half - 0.01 <= instance.center_y <= 1 - half + 0.01
            floats = instance is focus and scene.event == "floating"
            assert (instance.center_y + half <= 0.37) == floats
            turn = {"upside_down": 180, "sideways": 90}.get(scene.event, 0) if instance is focus else 0
            assert abs(abs(instance.tilt) - turn) <= 12
        assert any(item.color or item.count > 1 for item in scene.objects)
        assert {item.category: item.event for item in scene.objects}[scene.focus] == scene.event


def test_relations_are_true_of_every_instance(scenes: list[Scene]) -> None:
    found: Counter[str] = Counter()
    for scene in scenes:
        for a in scene.categories:
            for b in scene.categories:
                if a == b:
                    continue
                xs, ys = ({i.center_x for i in scene.instances if i.category == name} for name in (a, b))
                horizontal = scene.relation(a, b, "horizontal")
                assert (horizontal == "left") == (max(xs) + 0.1 <= min(ys))
                assert (horizontal == "right") == (scene.relation(b, a, "horizontal") == "left")
                assert (scene.relation(a, b, "vertical") == "above") == (scene.relation(b, a, "vertical") == "below")
                found[str(horizontal)] += 1
    assert min(found["left"], found["right"]) > 100


def test_training_company_is_biased_and_validation_less_so(scenes: list[Scene]) -> None:
    def share_of_one_theme(split: list[Scene]) -> float:
        several = [scene for scene in split if len(scene.objects) > 1]
        return sum(any(set(s.categories) <= set(theme) for theme in THEMES.values()) for s in several) / len(several)

    assert share_of_one_theme(scenes[:300]) > share_of_one_theme(scenes[300:]) + 0.1
    company = training_company(CONFIG, 3, 2000)
    assert company.together["tv"]["couch"] > 5 * company.frequency["couch"]
    assert abs(sum(company.frequency.values()) - np.mean([len(s.objects) for s in scenes[:300]])) < 0.3


def test_events_and_numbers_are_balanced(scenes: list[Scene]) -> None:
    events = Counter(scene.event for scene in scenes)
    assert set(events) == set(EVENTS)
    assert min(events.values()) > 0.7 * len(scenes) / len(EVENTS)


@pytest.mark.parametrize("size", [96, 160, 224])
def test_images_are_square_jpegs_that_are_not_flat(size: int, scenes: list[Scene]) -> None:
    for scene in scenes[:5]:
        with Image.open(io.BytesIO(render_jpeg(scene, size, 90))) as image:
            assert (image.format, image.size, image.mode) == ("JPEG", (size, size), "RGB")
            assert np.asarray(image).std() > 8


def test_every_object_shows_where_the_ground_truth_says(scenes: list[Scene]) -> None:
    """Leaving one picture out changes the image at its place and only near it."""
    for scene in scenes[:20]:
        full = np.asarray(render(scene, 160), np.int16)
        for number, instance in enumerate(scene.instances):
            rest = scene.instances[:number] + scene.instances[number + 1 :]
            without = np.asarray(render(Scene(**{**vars(scene), "instances": rest}), 160), np.int16)
            changed = np.abs(full - without).max(-1) > 24
            assert changed.sum() > 40, (scene.key, instance)
            rows, columns = np.nonzero(changed)
            reach = instance.size * 0.72 + 0.05
            assert np.abs(columns / 160 - instance.center_x).max() < reach
            assert np.abs(rows / 160 - instance.center_y).max() < reach


def test_tinted_objects_have_their_color() -> None:
    for scene in (sample_scene(CONFIG, 5, "train", index) for index in range(60)):
        named = [item for item in scene.objects if item.color and item.category == "car"]
        if not named or scene.night:
            continue
        color = named[0].color
        assert color is not None
        (place,) = [i for i in scene.instances if i.category == "car"][:1]
        pixels = np.asarray(render(scene, 160), np.float32)
        half = place.size / 4
        box = pixels[
            int((place.center_y - half) * 160) : int((place.center_y + half) * 160),
            int((place.center_x - half) * 160) : int((place.center_x + half) * 160),
        ].reshape(-1, 3)
        distances = {name: np.linalg.norm(box - np.array(rgb), axis=-1).min() for name, rgb in COLORS.items()}
        assert distances[color] < 60


def test_a_scene_is_made_by_its_index_alone() -> None:
    image, record = scene_sample(REQUEST, 11)
    assert (image, record) == scene_sample(REQUEST, 11)
    assert record["id"] == "train-0000011"
    assert image != scene_sample(REQUEST, 12)[0]


def test_artwork_covers_the_vocabulary_and_carries_its_license() -> None:
    rows = json.loads((FOLDER / "index.json").read_text())
    assert {row["category"] for row in rows} == set(CATEGORIES)
    assert {row["file"] for row in rows} == {path.name for path in FOLDER.glob("*.png")}
    assert 80 <= len(rows) <= 100
    assert sum(path.stat().st_size for path in FOLDER.iterdir() if path.is_file()) < 1_000_000
    assert "SIL OPEN FONT LICENSE Version 1.1" in (FOLDER / "LICENSE").read_text()
    assert pictures("person") == tuple(sorted(pictures("person")))


def test_vocabulary_refers_to_known_categories() -> None:
    assert {name for pair in COMPANIONS.items() for name in pair} <= set(CATEGORIES)
    assert len({category.plural for category in CATEGORIES.values()}) == len(CATEGORIES)
