from __future__ import annotations

import json
import re
from collections import Counter
from pathlib import Path

import pytest

from shellv_core.data.scenes.benchmarks import CHAIR_NAME, HAL_EVAL_NAME, POPE_SPLITS, benchmark_files, pope_name
from shellv_core.data.scenes.config import ScenesConfig
from shellv_core.data.scenes.generate import SceneRequest, scene_record
from shellv_core.data.scenes.statistics import training_company
from shellv_core.data.scenes.vocabulary import CATEGORIES
from shellv_core.errors import DataError

CONFIG = ScenesConfig()
COMPANY = training_company(CONFIG, 0, 1500)
RECORDS = {
    record["image"]: record
    for _, record in (scene_record(SceneRequest(CONFIG, 0, "validation", 1500), index) for index in range(120))
}


@pytest.fixture(scope="module")
def files() -> dict[str, bytes]:
    return benchmark_files(list(RECORDS.values()), COMPANY, num_images=50, questions_per_image=6, seed=0)


def rows(content: bytes) -> list[dict]:
    return [json.loads(line) for line in content.decode().splitlines()]


def asked_category(row: dict) -> str:
    match = re.fullmatch(r"Is there an? (.+) in the image\?", row["text"])
    assert match
    return match[1]


def present(row: dict) -> set[str]:
    return {item["category"] for item in RECORDS[row["image"]]["objects"]}


@pytest.mark.parametrize("split", POPE_SPLITS)
def test_pope_is_balanced_and_true(files: dict[str, bytes], split: str) -> None:
    questions = rows(files[pope_name(split)])  # type: ignore[arg-type]
    assert [row["question_id"] for row in questions] == list(range(1, 301))
    assert [row["label"] for row in questions] == ["yes", "no"] * 150
    assert set(Counter(row["image"] for row in questions).values()) == {6}
    for row in questions:
        assert (asked_category(row) in present(row)) == (row["label"] == "yes")
    assert len({(row["image"], row["text"]) for row in questions}) == 300


def test_popular_and_adversarial_choose_as_pope_does(files: dict[str, bytes]) -> None:
    def absent(split: str) -> dict[str, list[str]]:
        chosen: dict[str, list[str]] = {}
        for row in rows(files[pope_name(split)]):  # type: ignore[arg-type]
            if row["label"] == "no":
                chosen.setdefault(row["image"], []).append(asked_category(row))
        return chosen

    for image, names in absent("popular").items():
        others = set(CATEGORIES) - present({"image": image}) - set(names)
        assert min(COMPANY.frequency[name] for name in names) >= max(COMPANY.frequency[name] for name in others)
    for image, names in absent("adversarial").items():
        here = present({"image": image})

        def weight(name: str, here: frozenset[str] = frozenset(here)) -> float:
            return sum(COMPANY.together[other].get(name, 0.0) for other in here)

        others = set(CATEGORIES) - here - set(names)
        assert min(map(weight, names)) > 0
        assert min(map(weight, names)) >= max(map(weight, others)) - 1e-9
    random = Counter(name for names in absent("random").values() for name in names)
    assert len(random) > 40


@pytest.mark.parametrize("split", POPE_SPLITS)
def test_pope_has_the_format_of_the_real_files(files: dict[str, bytes], split: str, shared: Path) -> None:
    real = rows((shared / "benchmarks" / "pope" / f"coco_pope_{split}.json").read_bytes())
    ours = rows(files[pope_name(split)])  # type: ignore[arg-type]
    assert [(key, type(value)) for key, value in ours[0].items()] == [(k, type(v)) for k, v in real[0].items()]
    assert [row["label"] for row in ours[:6]] == [row["label"] for row in real[:6]]
    wording = {asked_category(row): row["text"] for row in real if "an traffic light" not in row["text"]}
    shared_names = [row for row in ours if asked_category(row) in wording]
    assert shared_names
    assert all(row["text"] == wording[asked_category(row)] for row in shared_names)
    # COCO's classes, all but a few of which the real questions happen to name.
    assert len(set(CATEGORIES) - set(wording)) <= 6


def test_hal_eval_has_the_format_of_the_real_file(files: dict[str, bytes], shared: Path) -> None:
    real = json.loads((shared / "benchmarks" / "hal_eval" / "in_domain_evaluation.json").read_bytes())
    ours = json.loads(files[HAL_EVAL_NAME])
    assert len(ours) == 50
    assert list(ours[0]) == list(real[0])
    assert list(ours[0]["hal_caption"][0]) == list(real[0]["hal_caption"][0])
    for item in ours:
        assert [lie["type"] for lie in item["hal_caption"]] == [lie["type"] for lie in real[0]["hal_caption"]]


def test_hal_eval_and_chair_tell_the_ground_truth(files: dict[str, bytes]) -> None:
    items = json.loads(files[HAL_EVAL_NAME])
    truths = rows(files[CHAIR_NAME])
    assert [item["image"] for item in items] == [truth["image"] for truth in truths] == list(RECORDS)[:50]
    for item, truth in zip(items, truths, strict=True):
        record = RECORDS[item["image"]]
        assert item["caption"] == record["caption"]
        assert {lie["caption"] for lie in item["hal_caption"]} == {
            lie["text"] for lie in record["hallucinated_captions"]
        }
        assert set(truth["objects"]) == present(truth)
        assert truth["captions"] == [record["caption"]]


def test_too_few_scenes_are_refused() -> None:
    with pytest.raises(DataError, match=r"needs 100 validation scenes with at least 3 kinds.*Raise num_validation"):
        benchmark_files(list(RECORDS.values())[:100], COMPANY, num_images=100, questions_per_image=6, seed=0)
