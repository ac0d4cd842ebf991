"""The generation of answers, killed at random moments, over and over."""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from multiprocessing.process import BaseProcess
from pathlib import Path

NUM_KILLS = 10
NUM_IMAGES = 48
WORDS = ("dog", "cat", "car", "bus")


def answer(folder: str) -> None:
    """What the killed processes run: a journal, and an answer file of it at the end."""
    from shellv_core.evaluation.answers import answer_all, answer_rows, answers_to, derange, plan_prompts
    from shellv_core.evaluation.benchmarks.pope import Pope
    from tests.evaluation.tiny_llava import picture
    from tests.reliability.warm_generator import GENERATOR

    images = {f"{number}.png": picture(number) for number in range(NUM_IMAGES)}
    rows = [
        {"question_id": f"{image}-{word}", "image": image, "text": f"is there a {word} in the image ?", "label": "yes"}
        for image in images
        for word in WORDS
    ]
    benchmark, substitutes = Pope(rows), derange(images, 0)
    prompts = plan_prompts([benchmark], substitutes)
    answered = answer_all(prompts, GENERATOR, images, Path(folder) / "journal", images_per_block=2)
    lines = [json.dumps(row) + "\n" for row in answer_rows(benchmark, answers_to(benchmark, answered.texts))]
    (Path(folder) / "answers.jsonl").write_text("".join(lines))


def test_10_kills_change_no_byte_of_the_answers(tmp_path: Path) -> None:
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    killed.mkdir()
    whole.mkdir()
    # Importing takes seconds: it is done once, in the process that the others are forked from.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.reliability.warm_generator"])
    journal = killed / "journal"
    chance = random.Random(0)
    moments: set[int] = set()
    for _ in range(NUM_KILLS):
        process = context.Process(target=answer, args=(str(killed),))
        process.start()
        # Some bytes later, so that the kill falls into the answering and not into the start of the process.
        wanted = _size(journal) + chance.randint(1, 1200)
        while process.is_alive() and _size(journal) < wanted:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.01))
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        assert process.exitcode == -signal.SIGKILL, "finished before its kill: raise NUM_IMAGES"
        moments.add(_size(journal))
        questions = [json.loads(line) for line in journal.read_bytes().split(b"\n")[:-1]]
        assert len(questions) == len({(row["image"], row["prompt"]) for row in questions}), "a row is repeated"
    assert len(moments) == NUM_KILLS, "a kill fell before the first answer"
    for folder in (killed, whole):
        _finish(context.Process(target=answer, args=(str(folder),)))
    content = (whole / "answers.jsonl").read_bytes()
    assert (killed / "answers.jsonl").read_bytes() == content
    assert (killed / "journal").read_bytes() == (whole / "journal").read_bytes()
    rows = [json.loads(line) for line in content.splitlines()]
    assert len(rows) == NUM_IMAGES * len(WORDS)
    assert len({row["text"] for row in rows}) > 4, "the tiny model must tell images and questions apart"


def _finish(process: BaseProcess) -> None:
    process.start()
    process.join()
    assert process.exitcode == 0


def _size(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0
