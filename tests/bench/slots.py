"""Slots against one request at a time, LLaVA's five threads, and batches that run to their longest answer.

    python -m tests.bench.slots                     # about 8 minutes on two cores that have nothing else to do
    python -m tests.bench.slots --rounds 1 --requests 16 --clients 8

All variants answer the same seeded requests (a picture and a question each, greedy, lengths given) with one random
model in one process, in rounds that go through all of them, and must say the same. `--clients` ask, each again as soon
as it is answered. Time to the first token is counted from when a client asks.

serial   this project's engine with batching=serial
threads  LLaVA's worker: at most five `generate` calls at once, each in a thread with a streamer
batches  what waits is padded on the left and generated together until the longest answer ends
slots    this project's engine
"""

from __future__ import annotations

import argparse
import asyncio
import itertools
import json
import os
import random
import threading
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from shellv_core.serving.engine import GenerationRequest, ImagePart, Message, TextPart
from shellv_core.serving.transformers_engine import EngineConfig, TransformersEngine
from tests.serving.requests_at_random import picture, words
from tests.serving.tiny_model import build_processor

THREADS, LARGEST_BATCH = 5, 32
FIXED, SHORTEST, LONGEST = 64, 8, 200
VOCABULARY = 8192
Ask = Callable[[GenerationRequest, "Timing"], Awaitable[list[int]]]


@dataclass
class Timing:
    """Moments of one answer; `tokens` holds that of each token."""

    asked: float = 0.0
    tokens: list[float] = field(default_factory=list)


def build_bench_model(processor: Any) -> Any:
    """A Starcoder2 of 30 million parameters that sees 144 image tokens a picture, random."""
    from transformers import CLIPVisionConfig, LlavaConfig, LlavaForConditionalGeneration, Starcoder2Config

    torch.manual_seed(0)
    tokenizer = processor.tokenizer
    text = Starcoder2Config(
        hidden_size=512,
        intermediate_size=2048,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        max_position_embeddings=1024,
        sliding_window=None,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        initializer_range=0.08,
        tie_word_embeddings=False,
    )
    vision = CLIPVisionConfig(
        hidden_size=160,
        intermediate_size=640,
        num_hidden_layers=6,
        num_attention_heads=4,
        image_size=96,
        patch_size=8,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        vision_feature_layer=-1,
        tie_word_embeddings=False,
    )
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        # Only tokens that the small tokenizer knows, and no end, so that lengths are those asked for.
        model.lm_head.weight[len(tokenizer) :] = 0
        model.lm_head.weight[tokenizer.eos_token_id] = 0
    return model


def requests_of(count: int, lengths: Sequence[int], seed: int) -> list[GenerationRequest]:
    """Requests with a picture of their own each, so that nothing is answered from a cache."""
    rng = random.Random(seed)
    return [
        GenerationRequest(
            (Message("user", (ImagePart(picture(rng)), TextPart(words(rng, 40)))),),
            max_tokens=lengths[index % len(lengths)],
            min_tokens=lengths[index % len(lengths)],
        )
        for index in range(count)
    ]


async def in_engine(engine: TransformersEngine, request: GenerationRequest, timing: Timing) -> list[int]:
    """Ask one of this project's engines."""
    token_ids: list[int] = []
    async for event in engine.generate(request):
        timing.tokens += [time.perf_counter()] * len(event.token_ids)
        token_ids += event.token_ids
    return token_ids


class _Stamps:
    """A streamer that only notes when tokens come; the first call brings the prompt."""

    def __init__(self, timings: Sequence[Timing], lengths: Sequence[int]) -> None:
        self._timings, self._lengths, self._calls = timings, lengths, 0

    def put(self, value: Any) -> None:
        for timing, length in zip(self._timings, self._lengths, strict=True):
            if 0 < self._calls <= length:
                timing.tokens.append(time.perf_counter())
        self._calls += 1

    def end(self) -> None:
        pass


def inputs_of(processor: Any, requests: Sequence[GenerationRequest]) -> Any:
    """Padded inputs of `generate`."""
    prompts, images = [], []
    for request in requests:
        content = []
        for part in request.messages[0].parts:
            if isinstance(part, ImagePart):
                images.append(part.image)
                content.append({"type": "image"})
            else:
                content.append({"type": "text", "text": part.text})
        turns = [{"role": "user", "content": content}]
        prompts.append(processor.apply_chat_template(turns, add_generation_prompt=True))
    processor.tokenizer.padding_side = "left"
    return processor(text=prompts, images=images, return_tensors="pt", padding=True)


def generated(model: Any, inputs: Any, lengths: Sequence[int], streamer: Any = None) -> list[list[int]]:
    """Answers of transformers' `generate`, each cut to its length."""
    with torch.inference_mode():
        output = model.generate(
            **inputs, max_new_tokens=max(lengths), min_new_tokens=max(lengths), do_sample=False, streamer=streamer
        )
    answers = output[:, inputs["input_ids"].shape[1] :].tolist()
    return [answer[:length] for answer, length in zip(answers, lengths, strict=True)]


class FiveThreads:
    """LLaVA's model worker: a semaphore before threads that all run `generate` on one model."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor
        self._places, self._lock = asyncio.Semaphore(THREADS), threading.Lock()

    async def __call__(self, request: GenerationRequest, timing: Timing) -> list[int]:
        async with self._places:
            return await asyncio.to_thread(self._answer, request, timing)

    def _answer(self, request: GenerationRequest, timing: Timing) -> list[int]:
        with self._lock:
            inputs = inputs_of(self._processor, [request])
        lengths = [request.max_tokens or 0]
        return generated(self._model, inputs, lengths, _Stamps([timing], lengths))[0]


class Batches:
    """Takes all that waits, up to a bound, and answers it together; nothing joins before the longest has ended.

    A batch cannot be streamed by transformers, so its tokens come with its end.
    """

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor
        self._waiting: list[tuple[GenerationRequest, Timing, asyncio.Future[list[int]]]] = []
        self._worker: asyncio.Task[None] | None = None

    async def __call__(self, request: GenerationRequest, timing: Timing) -> list[int]:
        future: asyncio.Future[list[int]] = asyncio.get_running_loop().create_future()
        self._waiting.append((request, timing, future))
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await future

    async def _work(self) -> None:
        # All clients of the first moment are let in.
        await asyncio.sleep(0)
        while self._waiting:
            batch, self._waiting = self._waiting[:LARGEST_BATCH], self._waiting[LARGEST_BATCH:]
            answers = await asyncio.to_thread(self._answer, [request for request, _, _ in batch])
            now = time.perf_counter()
            for (_, timing, future), answer in zip(batch, answers, strict=True):
                timing.tokens = [now] * len(answer)
                future.set_result(answer)

    def _answer(self, requests: list[GenerationRequest]) -> list[list[int]]:
        return generated(
            self._model, inputs_of(self._processor, requests), [request.max_tokens or 0 for request in requests]
        )


@dataclass
class Figures:
    """What one variant did in one round."""

    variant: str
    lengths: str
    round: int
    tokens: int
    seconds: float
    cpu_seconds: float
    first_token: list[float]
    between_tokens: list[float]
    whole: list[float]


async def closed_loop(ask: Ask, requests: Sequence[GenerationRequest], clients: int) -> tuple[Any, ...]:
    """All requests by `clients` that each have one under way: answers, timings, wall and CPU seconds."""
    left = iter(enumerate(requests))
    answers: list[list[int]] = [[] for _ in requests]
    timings = [Timing() for _ in requests]

    async def client() -> None:
        for index, request in left:
            timings[index].asked = time.perf_counter()
            answers[index] = await ask(request, timings[index])

    begun, cpu = time.perf_counter(), time.process_time()
    await asyncio.gather(*(client() for _ in range(clients)))
    return answers, timings, time.perf_counter() - begun, time.process_time() - cpu


def variants(model: Any, processor: Any, clients: int) -> dict[str, Callable[[], tuple[Ask, Any]]]:
    """How to make each way of answering, and the engine to drain after it."""

    def engine(batching: str) -> tuple[Ask, TransformersEngine]:
        config = EngineConfig(batching=batching, slots=clients, max_waiting=clients, max_wait_seconds=3600)
        made = TransformersEngine(model, processor, config)
        return lambda request, timing: in_engine(made, request, timing), made

    return {
        "serial": lambda: engine("serial"),
        "threads": lambda: (FiveThreads(model, processor), None),
        "batches": lambda: (Batches(model, processor), None),
        "slots": lambda: engine("slots"),
    }


def measure(args: argparse.Namespace) -> tuple[list[Figures], dict[str, int]]:
    """Figures of all rounds, and how many answers of each variant equal the serial one's."""
    processor = build_processor()
    processor.patch_size = 8
    processor.image_processor.size = {"shortest_edge": 96}
    processor.image_processor.crop_size = {"height": 96, "width": 96}
    model = build_bench_model(processor)
    parameters = sum(parameter.numel() for parameter in model.model.language_model.parameters())
    print(f"language model of {parameters / 1e6:.1f} M parameters, {torch.get_num_threads()} threads")
    rng = random.Random(0)
    workloads = {"fixed": [FIXED], "mixed": [rng.randint(SHORTEST, LONGEST) for _ in range(args.requests)]}
    found, equal = [], dict.fromkeys(variants(model, processor, args.clients), 0)
    for number, (lengths, choices) in itertools.product(range(args.rounds), workloads.items()):
        requests = requests_of(args.requests, choices, seed=number)
        expected: list[list[int]] = []
        for name, make in variants(model, processor, args.clients).items():
            figures, answers = asyncio.run(run(name, make, requests, args.clients))
            figures.lengths, figures.round = lengths, number
            expected = expected or answers
            equal[name] += sum(answer == other for answer, other in zip(answers, expected, strict=True))
            found.append(figures)
            rate = figures.tokens / figures.seconds
            print(f"round {number} {lengths:6} {name:8} {rate:7.1f} tokens/s in {figures.seconds:5.1f} s", flush=True)
    return found, equal


async def run(
    name: str, make: Callable[[], tuple[Ask, Any]], requests: Sequence[GenerationRequest], clients: int
) -> tuple[Figures, list[list[int]]]:
    """One variant over all requests."""
    ask, engine = make()
    await ask(requests[0], Timing())
    answers, timings, seconds, cpu_seconds = await closed_loop(ask, requests, clients)
    if engine is not None:
        await engine.drain(0)
    return Figures(
        variant=name,
        lengths="",
        round=0,
        tokens=sum(map(len, answers)),
        seconds=seconds,
        cpu_seconds=cpu_seconds,
        first_token=[timing.tokens[0] - timing.asked for timing in timings],
        between_tokens=[gap for timing in timings for gap in np.diff(timing.tokens).tolist()],
        whole=[timing.tokens[-1] - timing.asked for timing in timings],
    ), answers


def table(found: Sequence[Figures]) -> list[str]:
    """Lines of Markdown."""
    lines = [
        "| lengths | variant | tokens/s | to serial | tokens/CPU-s | first token p50 | between tokens p50 | p95 |"
        " whole p50 | p95 |",
        "|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    rates: dict[tuple[str, str], float] = {}
    groups: dict[tuple[str, str], list[Figures]] = {}
    for each in sorted(found, key=lambda each: each.lengths):
        groups.setdefault((each.lengths, each.variant), []).append(each)
    for (lengths, variant), rounds in groups.items():
        tokens = sum(each.tokens for each in rounds)
        rates[lengths, variant] = rate = tokens / sum(each.seconds for each in rounds)
        first, between, whole = (
            np.concatenate([getattr(each, name) for each in rounds])
            for name in ("first_token", "between_tokens", "whole")
        )
        lines.append(
            f"| {lengths} | {variant} | {rate:.1f} | {rate / rates[lengths, 'serial']:.2f}"
            f" | {tokens / sum(each.cpu_seconds for each in rounds):.1f} | {np.median(first):.2f} s"
            f" | {1e3 * np.median(between):.0f} ms | {1e3 * np.quantile(between, 0.95):.0f} ms"
            f" | {np.median(whole):.1f} s | {np.quantile(whole, 0.95):.1f} s |"
        )
    return lines


def main() -> None:
    """Measure, print, and write what `--json` asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=48, help="of each round and kind of lengths")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--json", type=Path, help="file for every round's figures")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    found, equal = measure(args)
    print("\n".join(["", *table(found), ""]))
    total = args.rounds * 2 * args.requests
    print(", ".join(f"{name}: {count} of {total} answers equal serial's" for name, count in equal.items()))
    if args.json:
        args.json.write_text(json.dumps([vars(each) for each in found]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
