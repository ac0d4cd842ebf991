import json

import pytest

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.answers import Prompt, answer_all, answer_rows, answers_to, derange, plan_prompts
from shellv_core.evaluation.benchmarks.pope import Pope

IMAGES = {f"{index}.jpg": b"" for index in range(10)}


class Parrot:
    """Repeats what it is asked, and dies after some blocks where it is told to."""

    def __init__(self, blocks_to_live=None):
        self.asked = []
        self.blocks_to_live = blocks_to_live

    def generate(self, prompts, images):
        if self.blocks_to_live is not None and len(self.asked) == self.blocks_to_live:
            raise KeyboardInterrupt
        self.asked.append(list(prompts))
        return [f"{prompt.image} {prompt.text}" for prompt in prompts]


def pope(split, texts=("dog?", "cat?")):
    rows = [
        {"question_id": number, "image": image, "text": text, "label": "yes"}
        for number, (image, text) in enumerate([(image, text) for image in IMAGES for text in texts])
    ]
    return Pope(rows, split)


def test_no_image_stands_for_itself():
    for seed in range(20):
        substitutes = derange(IMAGES, seed)
        assert sorted(substitutes) == sorted(substitutes.values()) == sorted(IMAGES)
        assert all(image != shown for image, shown in substitutes.items())
    assert derange(IMAGES, 1) == derange(reversed(IMAGES), 1)
    assert derange(IMAGES, 1) != derange(IMAGES, 2)
    with pytest.raises(EvaluationError, match="at least two images"):
        derange(["a"], 0)


def test_same_question_is_asked_once():
    substitutes = derange(IMAGES, 0)
    prompts = plan_prompts([pope("random"), pope("popular", ("dog?", "bus?"))], substitutes)
    assert len(prompts) == len(set(prompts)) == 30, "dog, cat and bus about each image; blind ones are among them"
    order = [prompt.image for prompt in prompts]
    assert order == sorted(order, key=order.index), "ordered by image"


def test_rows_know_what_was_shown(tmp_path):
    benchmark, substitutes = pope("random"), derange(IMAGES, 0)
    texts = answer_all(plan_prompts([benchmark], substitutes), Parrot(), IMAGES, tmp_path / "log", 3)
    assert answers_to(benchmark, texts)["3"] == "1.jpg cat?"
    row = answer_rows(benchmark, answers_to(benchmark, texts, substitutes), substitutes)[3]
    assert row["text"] == f"{substitutes['1.jpg']} cat?"
    assert (row["question_id"], row["image"], row["shown_image"]) == ("3", "1.jpg", substitutes["1.jpg"])


def test_blocks_are_bounded_by_images(tmp_path):
    parrot = Parrot()
    prompts = plan_prompts([pope("random")], derange(IMAGES, 0))
    answer_all(prompts, parrot, IMAGES, tmp_path / "log", 4)
    assert [len({prompt.image for prompt in block}) for block in parrot.asked] == [4, 4, 2]


@pytest.mark.parametrize("torn", [0, 1, 25, 60])
def test_a_killed_run_continues(tmp_path, torn):
    prompts = plan_prompts([pope("random")], derange(IMAGES, 0))
    whole = answer_all(prompts, Parrot(), IMAGES, tmp_path / "whole", 3)
    log = tmp_path / "log"
    with pytest.raises(KeyboardInterrupt):
        answer_all(prompts, Parrot(blocks_to_live=2), IMAGES, log, 3)
    content = log.read_bytes()
    log.write_bytes(content[: len(content) - torn])

    second = Parrot()
    assert answer_all(prompts, second, IMAGES, log, 3) == whole
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert len(rows) == len(prompts) == len({(row["image"], row["prompt"]) for row in rows})
    first_whole_blocks = 2 if torn == 0 else 1
    assert len(second.asked) == 4 - first_whole_blocks, "blocks are asked as in an uninterrupted run"
    third = Parrot()
    assert answer_all(prompts, third, IMAGES, log, 3) == whole
    assert third.asked == []


def test_missing_images_are_named_before_any_answer(tmp_path):
    parrot = Parrot()
    with pytest.raises(EvaluationError, match=r"1 images .* 'x\.jpg'"):
        answer_all([Prompt("x.jpg", "?", 1)], parrot, IMAGES, tmp_path / "log")
    assert not (tmp_path / "log").exists()
