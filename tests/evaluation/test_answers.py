import json

import pytest

from shellv_core.endpoint.asking import Reply
from shellv_core.errors import ConfigError, EvaluationError
from shellv_core.evaluation.answers import (
    Prompt,
    Shard,
    answer_all,
    answer_rows,
    answers_to,
    derange,
    plan_prompts,
    read_answers,
)
from shellv_core.evaluation.benchmarks.pope import Pope

IMAGES = {f"{index}.jpg": b"" for index in range(10)}


class Parrot:
    """Repeats what it is asked, and dies after some blocks where it is told to."""

    def __init__(self, blocks_to_live=None):
        self.asked = []
        self.blocks_to_live = blocks_to_live

    def generate(self, blocks, images, answered):
        for block in blocks:
            if all(prompt in answered for prompt in block):
                continue
            if self.blocks_to_live is not None and len(self.asked) == self.blocks_to_live:
                raise KeyboardInterrupt
            self.asked.append(list(block))
            yield {prompt: Reply(f"{prompt.image} {prompt.text}") for prompt in block}


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
    texts = answer_all(plan_prompts([benchmark], substitutes), Parrot(), IMAGES, tmp_path / "log", 3).texts
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


@pytest.mark.parametrize("junk", [b"\0" * 50, b'{"image": "0.jpg"}\n', b"[]\n", "\u00e9".encode()[:1]])
def test_what_a_power_cut_leaves_is_cut_off(tmp_path, junk):
    prompts = plan_prompts([pope("random")], derange(IMAGES, 0))
    whole = answer_all(prompts, Parrot(), IMAGES, tmp_path / "whole", 3)
    with pytest.raises(KeyboardInterrupt):
        answer_all(prompts, Parrot(blocks_to_live=2), IMAGES, tmp_path / "log", 3)
    with (tmp_path / "log").open("ab") as log:
        log.write(junk)
    assert answer_all(prompts, Parrot(), IMAGES, tmp_path / "log", 3) == whole
    assert (tmp_path / "log").read_bytes() == (tmp_path / "whole").read_bytes()


def test_shards_ask_each_prompt_once_in_the_same_blocks(tmp_path):
    prompts = plan_prompts([pope("random")], derange(IMAGES, 0))
    alone = Parrot()
    whole = answer_all(prompts, alone, IMAGES, tmp_path / "whole", 3)
    known, asked = {}, []
    for index in range(3):
        parrot, log = Parrot(), tmp_path / f"part-{index}"
        part = answer_all(prompts, parrot, IMAGES, log, 3, shard=Shard(index, 3))
        assert part.texts == read_answers(log)
        known |= part.texts
        asked += parrot.asked
    assert sorted(map(str, asked)) == sorted(map(str, alone.asked))
    last = Parrot()
    assert answer_all(prompts, last, IMAGES, tmp_path / "joined", 3, known=known) == whole
    assert last.asked == []


@pytest.mark.parametrize("text", ["4/4", "1", "a/b", "-1/2", "0/0"])
def test_shards_that_are_none(text):
    with pytest.raises(ConfigError, match="INDEX/COUNT"):
        Shard.parse(text)


class Moody(Parrot):
    """Fails at what it is told to, and says nothing at all to cats."""

    def __init__(self, faulty):
        super().__init__()
        self.faulty = faulty

    def generate(self, blocks, images, answered):
        for batch in super().generate(blocks, images, answered):
            for prompt in batch:
                if prompt in self.faulty:
                    yield {prompt: Reply(fault="HTTP 500")}
                elif "cat" not in prompt.text:
                    yield {prompt: batch[prompt]}


def test_what_is_missing_is_counted_and_asked_again(tmp_path):
    benchmark = pope("random")
    prompts = plan_prompts([benchmark], derange(IMAGES, 0))
    dogs, cats = ([prompt for prompt in prompts if word in prompt.text] for word in ("dog", "cat"))
    part = answer_all(prompts, Moody(set(dogs[:3])), IMAGES, tmp_path / "log", 3)
    assert part.faults == dict.fromkeys(dogs[:3], "HTTP 500") | dict.fromkeys(cats, "no reply")
    assert set(part.texts) == set(dogs[3:])
    assert len(answer_rows(benchmark, answers_to(benchmark, part.texts))) == 7
    assert sorted(answers_to(benchmark, part.faults).values()) == ["HTTP 500"] * 3 + ["no reply"] * 10
    whole = answer_all(prompts, Parrot(), IMAGES, tmp_path / "log", 3)
    assert not whole.faults
    assert len(whole.texts) == len(prompts) == len((tmp_path / "log").read_text().splitlines())


def test_two_processes_cannot_write_one_log(tmp_path):
    prompts = plan_prompts([pope("random")], derange(IMAGES, 0))

    class Rival(Parrot):
        def generate(self, blocks, images, answered):
            with pytest.raises(EvaluationError, match="another process is answering"):
                answer_all(prompts, Parrot(), IMAGES, tmp_path / "log", 3)
            return super().generate(blocks, images, answered)

    assert len(answer_all(prompts, Rival(), IMAGES, tmp_path / "log", 3).texts) == len(prompts)
