"""Slots, full and always changing, against transformers' own `generate` and against one request at a time."""

from __future__ import annotations

import asyncio
import itertools

import pytest
import torch
from safetensors.torch import load_file, save_file

from shellv_core.models.config import LoraConfig
from shellv_core.models.lora import ADAPTER_WEIGHTS, add_lora, load_adapter, save_adapter
from shellv_core.serving.inference.adapters import AdapterSet
from shellv_core.serving.transformers_engine import EngineConfig, TransformersEngine
from tests.serving.requests_at_random import generate, random_requests
from tests.serving.tiny_model import build_model

CONCURRENCY = 16


def save_random_adapter(model, directory, seed, dora=False):
    """An adapter as finetune writes it, with a projector of its own, that changes what the model says."""
    config = LoraConfig(r=4, alpha=8, dora=dora)
    save_adapter(add_lora(model, config, seed=seed), directory, "base")
    weights, generator = load_file(directory / ADAPTER_WEIGHTS), torch.Generator().manual_seed(seed)
    for name, weight in weights.items():
        if "lora_B" in name or "modules_to_save" in name or "multi_modal_projector" in name:
            weights[name] = weight + 0.3 * torch.randn(weight.shape, generator=generator)
    save_file(weights, directory / ADAPTER_WEIGHTS)


@pytest.fixture(scope="module")
def adapters(processor, tmp_path_factory):
    found = {}
    for backbone, seed in itertools.product(("llama", "starcoder2"), (1, 2)):
        directory = tmp_path_factory.mktemp(f"{backbone}{seed}")
        save_random_adapter(build_model(processor, backbone=backbone), directory, seed)
        found.setdefault(backbone, {})[f"adapter{seed}"] = directory
    return found


async def answer_all(engine, requests):
    places = asyncio.Semaphore(CONCURRENCY)

    async def one(request):
        async with places:
            events = [event async for event in engine.generate(request)]
            token_ids = [token_id for event in events for token_id in event.token_ids]
            return token_ids, "".join(event.text for event in events), events[-1].finish_reason

    answers = await asyncio.gather(*map(one, requests))
    stats = engine.stats()
    await engine.drain(0)
    return answers, stats


def run(processor, backbone, adapters, requests, **options):
    model = build_model(processor, backbone=backbone)
    config = EngineConfig(max_waiting=CONCURRENCY, max_wait_seconds=600, **options)
    engine = TransformersEngine(model, processor, config, AdapterSet(model, adapters))
    return asyncio.run(answer_all(engine, requests))


def compare(processor, backbone, directories, requests):
    """Answers in slots, after checking that each of them is the one that it should be."""
    in_slots, stats = run(processor, backbone, directories, requests, slots=12, prefill_tokens=48)
    serial, _ = run(processor, backbone, directories, requests, batching="serial")
    models = {None: build_model(processor, backbone=backbone)}
    for name, directory in directories.items():
        models[name] = load_adapter(build_model(processor, backbone=backbone), directory)
    wrong = []
    for index, (request, slots_answer, serial_answer) in enumerate(zip(requests, in_slots, serial, strict=True)):
        token_ids, _, reason = slots_answer
        expected = generate(models[request.adapter], processor, request)
        cut = expected[: len(token_ids)] if request.stop and reason == "stop" else expected
        if slots_answer != serial_answer or token_ids != cut:
            wrong.append((index, request, slots_answer, serial_answer, expected))
    assert not wrong, f"{len(wrong)} of {len(requests)} differ, the first: {wrong[0]}"
    assert stats.finished == len(requests)
    return in_slots, stats


@pytest.mark.parametrize("backbone", ["llama", "starcoder2"])
def test_answers_in_slots_equal_those_of_generate(processor, adapters, backbone):
    requests = random_requests(24, [None, *adapters[backbone]], seed=7, longest=24)
    answers, stats = compare(processor, backbone, adapters[backbone], requests)
    # What is equal must also vary, or equality says nothing.
    assert len({tuple(token_ids) for token_ids, _, _ in answers}) > 20
    assert stats.prefix_tokens > 0
    assert stats.image_hits > 0


@pytest.mark.slow
@pytest.mark.parametrize("backbone", ["llama", "starcoder2"])
@pytest.mark.parametrize("seed", [0, 1])
def test_two_hundred_answers_in_slots_equal_those_of_generate(processor, adapters, backbone, seed):
    requests = random_requests(200, [None, *adapters[backbone]], seed, longest=60)
    answers, stats = compare(processor, backbone, adapters[backbone], requests)
    assert len({tuple(token_ids) for token_ids, _, _ in answers}) > 180
    print(f"{len(answers)} answers equal, {stats.completion_tokens} tokens, {stats}")
