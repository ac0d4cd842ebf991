"""Asking a model every question once, in a way that a killed run continues and many processes share.

Knows nothing of how a model works: an `AnswerGenerator` turns prompts into replies. Questions that show the same image
and say the same are asked once, whatever benchmark they come from, the blind run included.

Answers are appended to a journal as they come, and the files that others read are made of it at the end, in question
order. So they are the same, byte for byte, however often a run was cut off and however many processes had a part in it.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import random
import re
import threading
from collections import Counter
from collections.abc import Container, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Protocol

from shellv_core.endpoint.asking import Reply
from shellv_core.errors import ConfigError, EvaluationError
from shellv_core.evaluation.benchmark import Benchmark, Question
from shellv_core.logs import get_logger
from shellv_core.progress import Progress

logger = get_logger(__name__)


@dataclass(frozen=True)
class Prompt:
    """A text about one image ("" for none), and how long an answer may be."""

    image: str
    text: str
    max_new_tokens: int

    def seed(self, seed: int) -> int:
        """The prompt's own seed under a run's `seed`, 31 bits: what is sampled depends on nothing else."""
        key = f"{seed}\0{self.image}\0{self.text}\0{self.max_new_tokens}"
        return int.from_bytes(hashlib.sha256(key.encode()).digest()[:4], "big") >> 1


class AnswerGenerator(Protocol):
    """A model that answers questions about images."""

    def generate(
        self, blocks: Iterable[Sequence[Prompt]], images: Mapping[str, bytes], answered: Container[Prompt]
    ) -> Iterator[Mapping[Prompt, Reply]]:
        """Yield replies as they are there, to every prompt that is not in `answered`.

        What a prompt is answered depends on its block alone, not on what was answered before nor on other blocks.

        Args:
            blocks: prompts that may be worked on together.
            images: image name -> encoded file (JPEG, PNG).
            answered: prompts that may be left out.
        """
        ...


@dataclass(frozen=True)
class Shard:
    """One of `count` parts of the work."""

    index: int = 0
    count: int = 1

    @classmethod
    def parse(cls, text: str) -> Shard:
        """Read ``INDEX/COUNT``, such as 0/4.

        Raises:
            ConfigError: if it is not of that form or out of range.
        """
        match = re.fullmatch(r"(\d+)/(\d+)", text)
        if not match or not int(match[1]) < int(match[2]):
            raise ConfigError(f"shard={text!r} is not INDEX/COUNT with INDEX from 0 to COUNT - 1, such as 0/4.")
        return cls(int(match[1]), int(match[2]))


@dataclass
class Answered:
    """Answers by prompt, and the reason for every prompt that has none."""

    texts: dict[Prompt, str] = field(default_factory=dict)
    faults: dict[Prompt, str] = field(default_factory=dict)


def plan_prompts(benchmarks: Iterable[Benchmark], substitutes: Mapping[str, str] | None) -> list[Prompt]:
    """The distinct prompts of all benchmarks with the right images and with any substitutes, ordered by image."""
    prompts = [
        Prompt(image, question.prompt, benchmark.max_new_tokens)
        for benchmark in benchmarks
        for question in benchmark.questions
        for image in (question.image, *(() if substitutes is None else (_shown(question, substitutes),)))
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
    shard: Shard = Shard(),
    known: Mapping[Prompt, str] | None = None,
) -> Answered:
    """Answer every prompt of a shard, continuing what `log_path` holds.

    Prompts go to the generator in blocks of `images_per_block` images, of which a shard takes every `count`-th. Blocks
    depend on `prompts` alone, so that neither a kill nor the number of shards changes an answer. Each answer is in
    `log_path`, on the disk, before the next are asked for; a prompt without an answer is not, and is asked again by the
    next run.

    Args:
        stop: looked at whenever answers come.
        known: answers of other shards.

    Raises:
        EvaluationError: if an image is missing, or another process is writing to `log_path`.
        CancelledError: if `stop` was set.
    """
    missing = sorted({prompt.image for prompt in prompts if prompt.image and prompt.image not in images})
    if missing:
        raise EvaluationError(
            f"{len(missing)} images of the benchmarks are not in the data, for example {missing[0]!r}."
            " The benchmark files and the images must belong together: those of prepare_data to the validation shards"
            " of the same output, your own to the folder that you give with them."
        )
    blocks = _blocks(prompts, images_per_block)[shard.index :: shard.count]
    wanted = dict.fromkeys(prompt for block in blocks for prompt in block)
    result = Answered()
    with _open_log(log_path) as log:
        answers = {**(known or {}), **_read_log(log)}
        todo = {prompt for prompt in wanted if prompt not in answers}
        done = len(wanted) - len(todo)
        if done:
            logger.info("%s: continuing after %d of %d", description, done, len(wanted))
        with (
            Progress(len(wanted), description, "answer", done) as progress,
            contextlib.closing(_generate(generator, blocks, images, answers)) as batches,
        ):
            for batch in batches:
                new = {prompt: reply for prompt, reply in batch.items() if prompt in todo}
                todo.difference_update(new)
                said = {prompt: reply.text for prompt, reply in new.items() if not reply.fault}
                result.faults.update((prompt, reply.fault) for prompt, reply in new.items() if reply.fault)
                log.write("".join(_log_line(prompt, text) for prompt, text in said.items()).encode())
                log.flush()
                os.fsync(log.fileno())
                answers.update(said)
                progress.update(len(new))
                if stop is not None and stop.is_set():
                    raise CancelledError
    result.faults.update(dict.fromkeys(todo, "no reply"))
    if result.faults:
        reasons = Counter(result.faults.values())
        logger.warning("%s: %d of %d are missing (%s)", description, len(result.faults), len(wanted), told(reasons))
    result.texts = {prompt: answers[prompt] for prompt in wanted if prompt in answers}
    return result


def told(reasons: Mapping[str, int]) -> str:
    """Counts by reason in a row, the most frequent first."""
    return ", ".join(f"{reason}: {count}" for reason, count in sorted(reasons.items(), key=lambda each: -each[1]))


def read_answers(path: Path) -> dict[Prompt, str]:
    """The answers of a whole journal."""
    with path.open("rb") as log:
        return _parse_log(log.read())[0]


def answers_to(
    benchmark: Benchmark, texts: Mapping[Prompt, str], substitutes: Mapping[str, str] | None = None
) -> dict[str, str]:
    """Question id -> text for one benchmark; with `substitutes`, of its blind run. What is missing is left out.

    With the reasons of `Answered.faults` as texts, question id -> why there is no answer.
    """
    prompts = {question.question_id: _prompt_of(benchmark, question, substitutes) for question in benchmark.questions}
    return {question_id: texts[prompt] for question_id, prompt in prompts.items() if prompt in texts}


def answer_rows(
    benchmark: Benchmark, answers: Mapping[str, str], substitutes: Mapping[str, str] | None = None
) -> list[dict[str, Any]]:
    """Rows of an answer file, as ``shellv score`` reads them, in question order; blind rows tell which image was shown.

    A question without an answer has no row.
    """
    rows = []
    for question in benchmark.questions:
        if question.question_id not in answers:
            continue
        row = {"question_id": question.question_id, "image": question.image, "prompt": question.prompt}
        if substitutes is not None:
            row["shown_image"] = _shown(question, substitutes)
        rows.append({**row, "text": answers[question.question_id]})
    return rows


def _generate(
    generator: AnswerGenerator, blocks: Iterable[Sequence[Prompt]], images: Mapping[str, bytes], answers: Any
) -> Generator[Mapping[Prompt, Reply], None, None]:
    """The generator's replies; closing this closes it, whatever kind of iterator it is."""
    yield from generator.generate(blocks, images, answers)


def _shown(question: Question, substitutes: Mapping[str, str]) -> str:
    return substitutes[question.image] if question.image else ""


def _prompt_of(benchmark: Benchmark, question: Question, substitutes: Mapping[str, str] | None) -> Prompt:
    image = question.image if substitutes is None else _shown(question, substitutes)
    return Prompt(image, question.prompt, benchmark.max_new_tokens)


def _blocks(prompts: Sequence[Prompt], images_per_block: int) -> list[list[Prompt]]:
    """Prompts of so many images each; a prompt without an image counts as one."""
    blocks: list[list[Prompt]] = []
    seen: set[str] = set()
    for number, prompt in enumerate(prompts):
        image = prompt.image or f"\0{number}"
        if not blocks or (image not in seen and len(seen) == images_per_block):
            blocks.append([])
            seen = set()
        blocks[-1].append(prompt)
        seen.add(image)
    return blocks


@contextlib.contextmanager
def _open_log(path: Path) -> Iterator[IO[bytes]]:
    with path.open("a+b") as log:
        try:
            fcntl.flock(log, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise EvaluationError(
                f"another process is answering into {path}. Wait for it, or give each a part of the work (shard=0/2,"
                " shard=1/2)."
            ) from None
        yield log


def _log_line(prompt: Prompt, text: str) -> str:
    row = {"image": prompt.image, "prompt": prompt.text, "max_new_tokens": prompt.max_new_tokens, "text": text}
    return json.dumps(row, ensure_ascii=False) + "\n"


def _read_log(log: IO[bytes]) -> dict[Prompt, str]:
    """The log's answers; what a kill or a power cut left behind the last whole line is cut off."""
    log.seek(0)
    content = log.read()
    answers, length = _parse_log(content)
    if length < len(content):
        log.truncate(length)
    return answers


def _parse_log(content: bytes) -> tuple[dict[Prompt, str], int]:
    """Answers, and the number of bytes up to the end of the last line before any that is torn."""
    answers: dict[Prompt, str] = {}
    start = 0
    while (end := content.find(b"\n", start)) >= 0:
        try:
            row = json.loads(content[start:end])
            answers[Prompt(row["image"], row["prompt"], row["max_new_tokens"])] = row["text"]
        except (ValueError, KeyError, TypeError):
            break
        start = end + 1
    return answers, start
