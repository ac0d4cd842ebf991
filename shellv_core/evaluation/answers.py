"""Asking a model every question once, in a way that a killed run continues.

Knows nothing of how a model works: an `AnswerGenerator` turns prompts into texts. Questions that show the same image
and say the same are asked once, whatever benchmark they come from, the blind run included.
"""

from __future__ import annotations

import json
import os
import random
import threading
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Benchmark, Question
from shellv_core.logs import get_logger
from shellv_core.progress import Progress

logger = get_logger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A text about one image, and how long an answer may be."""

    image: str
    text: str
    max_new_tokens: int


class AnswerGenerator(Protocol):
    """A model that answers questions about images."""

    def generate(self, prompts: Sequence[Prompt], images: Mapping[str, bytes]) -> list[str]:
        """One answer for each prompt, in order; `images` maps names to encoded files (JPEG, PNG)."""
        ...


def plan_prompts(benchmarks: Iterable[Benchmark], substitutes: Mapping[str, str]) -> list[Prompt]:
    """The distinct prompts of all benchmarks with the right images and with the substitutes, ordered by image."""
    prompts = [
        Prompt(image, question.prompt, benchmark.max_new_tokens)
        for benchmark in benchmarks
        for question in benchmark.questions
        for image in (question.image, substitutes[question.image])
    ]
    position = {image: index for index, image in enumerate(dict.fromkeys(prompt.image for prompt in prompts))}
    return sorted(dict.fromkeys(prompts), key=lambda prompt: position[prompt.image])


def derange(images: Iterable[str], seed: int) -> dict[str, str]:
    """For each image another one, every one used once: what the blind run shows.

    Raises:
        EvaluationError: if there are fewer than two images.
    """
    order = sorted(set(images))
    if len(order) < 2:
        raise EvaluationError(f"a blind run needs at least two images to swap, got {len(order)}.")
    random.Random(seed).shuffle(order)
    return dict(zip(order, [*order[1:], order[0]], strict=True))


def answer_all(
    prompts: Sequence[Prompt],
    generator: AnswerGenerator,
    images: Mapping[str, bytes],
    log_path: Path,
    images_per_block: int = 64,
    description: str = "answers",
    stop: threading.Event | None = None,
) -> dict[Prompt, str]:
    """Answer every prompt, continuing what `log_path` holds.

    Prompts go to the generator in blocks of `images_per_block` images. Blocks depend on `prompts` alone, so that a
    continued run computes the same batches and gives the same answers as one that was never cut off; a block's answers
    are appended to `log_path` before the next begins.

    Raises:
        EvaluationError: if an image is missing.
        CancelledError: if `stop` was set; it is looked at between blocks.
    """
    missing = sorted({prompt.image for prompt in prompts} - set(images))
    if missing:
        raise EvaluationError(
            f"{len(missing)} images of the benchmarks are not in the data, for example {missing[0]!r}."
            " The benchmark files and the validation shards must come from the same prepare_data output."
        )
    answers = _read_log(log_path)
    done = sum(prompt in answers for prompt in prompts)
    if done:
        logger.info("%s: continuing after %d of %d", description, done, len(prompts))
    with log_path.open("a", encoding="utf-8") as log, Progress(len(prompts), description, "answer", done) as progress:
        for block in _blocks(prompts, images_per_block):
            todo = [prompt for prompt in block if prompt not in answers]
            if not todo:
                continue
            if stop is not None and stop.is_set():
                raise CancelledError
            texts = dict(zip(block, generator.generate(block, images), strict=True))
            log.writelines(_log_line(prompt, texts[prompt]) for prompt in todo)
            log.flush()
            os.fsync(log.fileno())
            answers.update((prompt, texts[prompt]) for prompt in todo)
            progress.update(len(todo))
    return {prompt: answers[prompt] for prompt in prompts}


def answers_to(
    benchmark: Benchmark, texts: Mapping[Prompt, str], substitutes: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Question id -> text for one benchmark; with `substitutes`, of its blind run."""
    return {
        question.question_id: texts[_prompt_of(benchmark, question, substitutes)] for question in benchmark.questions
    }


def answer_rows(
    benchmark: Benchmark, answers: Mapping[str, str], substitutes: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Rows of an answer file, as ``shellv score`` reads them; blind rows tell which image was shown."""
    rows = []
    for question in benchmark.questions:
        row = {"question_id": question.question_id, "image": question.image, "prompt": question.prompt}
        if substitutes is not None:
            row["shown_image"] = substitutes[question.image]
        rows.append({**row, "text": answers[question.question_id]})
    return rows


def _prompt_of(benchmark: Benchmark, question: Question, substitutes: Mapping[str, str] | None) -> Prompt:
    image = question.image if substitutes is None else substitutes[question.image]
    return Prompt(image, question.prompt, benchmark.max_new_tokens)


def _blocks(prompts: Sequence[Prompt], images_per_block: int) -> list[list[Prompt]]:
    blocks: list[list[Prompt]] = []
    seen: set[str] = set()
    for prompt in prompts:
        if not blocks or (prompt.image not in seen and len(seen) == images_per_block):
            blocks.append([])
            seen = set()
        blocks[-1].append(prompt)
        seen.add(prompt.image)
    return blocks


def _log_line(prompt: Prompt, text: str) -> str:
    row = {"image": prompt.image, "prompt": prompt.text, "max_new_tokens": prompt.max_new_tokens, "text": text}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_log(path: Path) -> dict[Prompt, str]:
    """The log's answers; a last line that was cut off is removed from the file."""
    answers: dict[Prompt, str] = {}
    if not path.exists():
        return answers
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        path.write_bytes(whole)
    for line in whole.decode("utf-8").split("\n"):
        if line:
            row = json.loads(line)
            answers[Prompt(row["image"], row["prompt"], row["max_new_tokens"])] = row["text"]
    return answers
