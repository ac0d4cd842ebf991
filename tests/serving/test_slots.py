"""What slots do when something goes wrong, runs short, or comes again."""

from __future__ import annotations

import asyncio

import pytest
import torch
from PIL import Image

from shellv_core.errors import ServingError
from shellv_core.serving.engine import (
    EngineStoppedError,
    GenerationError,
    GenerationRequest,
    ImagePart,
    Message,
    RequestError,
    TextPart,
)
from shellv_core.serving.inference.cache import PAGE, Placement, SlotCache
from shellv_core.serving.inference.memory import bytes_per_token
from shellv_core.serving.transformers_engine import EngineConfig, TransformersEngine
from tests.serving.tiny_model import build_model

RED = Image.new("RGB", (50, 40), "red")


def request(text="what is this ?", image=None, **options):
    parts = (ImagePart(image), TextPart(text)) if image else (TextPart(text),)
    return GenerationRequest((Message("user", parts),), **options)


async def answer(engine, request):
    events = [event async for event in engine.generate(request)]
    return [token_id for event in events for token_id in event.token_ids]


async def outcomes(engine, requests):
    return await asyncio.gather(*(answer(engine, each) for each in requests), return_exceptions=True)


@pytest.fixture
def new_engine(processor):
    engines = []

    def build(model=None, **options):
        engines.append(TransformersEngine(model or build_model(processor), processor, EngineConfig(**options)))
        return engines[-1]

    yield build
    for each in engines:
        asyncio.run(each.drain(0))


def several(count=6, **options):
    return [request(f"hello world {'red ' * index}?", max_tokens=6 + index, **options) for index in range(count)]


def break_step(model, monkeypatch, error, batches, times=1):
    """The language model raises `error` for batches of the sizes in `batches`, `times` times; counts the calls."""
    good, calls = model.model.language_model.forward, []

    def forward(*args, **kwargs):
        if len(kwargs["inputs_embeds"]) in batches and len(calls) < times:
            calls.append(len(kwargs["inputs_embeds"]))
            raise error
        return good(*args, **kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", forward)
    return calls


def test_a_step_without_memory_is_tried_again_with_fewer_slots(new_engine, processor, monkeypatch):
    expected = asyncio.run(outcomes(new_engine(), several()))
    model = build_model(processor)
    engine = new_engine(model, slots=4)
    calls = break_step(model, monkeypatch, torch.OutOfMemoryError("no memory"), batches={2, 3, 4})
    assert asyncio.run(outcomes(engine, several())) == expected
    stats = engine.stats()
    assert calls
    assert (stats.out_of_memory, stats.slots, stats.failed) == (1, 2, 0)


def test_without_memory_the_newest_request_fails_and_the_others_go_on(new_engine, processor, monkeypatch):
    model = build_model(processor)
    engine = new_engine(model, slots=4)
    error = RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory")
    break_step(model, monkeypatch, error, batches={3, 4}, times=99)
    results = asyncio.run(outcomes(engine, several(4)))
    failed = [index for index, each in enumerate(results) if isinstance(each, GenerationError)]
    assert failed
    assert 0 not in failed
    assert "ran out of memory" in str(results[failed[0]])
    assert [len(results[index]) for index in range(4) if index not in failed] == [
        6 + index for index in range(4) if index not in failed
    ]
    assert engine.stats().out_of_memory >= 2


def test_without_memory_for_keys_and_values_the_request_fails_and_the_next_is_answered(new_engine, monkeypatch):
    engine = new_engine(slots=4)
    add, calls = engine._runner._table.add, []

    def failing(row):
        calls.append(row)
        if len(calls) < 3:
            raise torch.OutOfMemoryError("no memory")
        add(row)

    monkeypatch.setattr(engine._runner._table, "add", failing)
    with pytest.raises(GenerationError, match="ran out of memory"):
        asyncio.run(answer(engine, request(max_tokens=3)))
    assert len(asyncio.run(answer(engine, request(max_tokens=3)))) == 3
    assert (engine.stats().slots, engine.stats().restarts) == (2, 0)


def test_a_fault_in_a_batch_ends_the_request_at_fault_alone(new_engine, processor, monkeypatch):
    requests = several(5)
    expected = asyncio.run(outcomes(new_engine(), requests))
    model = build_model(processor)
    engine = new_engine(model)
    good = model.model.language_model.forward
    poison = model.get_input_embeddings().weight[processor.tokenizer("three")["input_ids"][0]]

    def forward(*args, **kwargs):
        if (kwargs["inputs_embeds"] == poison).all(-1).any():
            raise IndexError("no such thing")
        return good(*args, **kwargs)

    monkeypatch.setattr(model.model.language_model, "forward", forward)
    results = asyncio.run(outcomes(engine, [*requests, request("three", max_tokens=3)]))
    assert isinstance(results.pop(), GenerationError)
    differing = [index for index, pair in enumerate(zip(results, expected, strict=True)) if pair[0] != pair[1]]
    # An answer that itself comes to say the word fails as well, and rightly.
    assert all(isinstance(results[index], GenerationError) for index in differing)
    assert len(differing) < 3


def test_what_is_not_finite_does_not_reach_the_slots_next_request(new_engine, processor, monkeypatch):
    requests = several(3)
    expected = asyncio.run(outcomes(new_engine(slots=1), requests))
    model = build_model(processor)
    engine = new_engine(model, slots=1)
    good, calls = model.model.language_model.forward, []

    def forward(*args, **kwargs):
        output = good(*args, **kwargs)
        calls.append(1)
        if len(calls) == 3:
            for layer in kwargs["past_key_values"].slot_layers:
                layer.keys[0] = layer.values[0] = float("nan")
            output.last_hidden_state.fill_(float("nan"))
        return output

    monkeypatch.setattr(model.model.language_model, "forward", forward)
    assert isinstance(asyncio.run(outcomes(engine, requests[:1]))[0], GenerationError)
    assert engine.stats().nonfinite == 1
    assert asyncio.run(outcomes(engine, requests)) == expected
    assert engine.health().ready


def test_a_model_that_answers_nothing_finite_is_not_ready(new_engine, processor):
    model = build_model(processor)
    engine = new_engine(model)
    with torch.no_grad():
        model.lm_head.weight.fill_(float("nan"))
    results = asyncio.run(outcomes(engine, several(3)))
    assert all(isinstance(each, GenerationError) for each in results)
    assert not engine.health().ready
    assert "not finite" in engine.health().reason


def test_a_dead_thread_is_started_once_more(new_engine, monkeypatch):
    engine = new_engine(slots=2)

    def dies(waiting):
        raise ZeroDivisionError

    monkeypatch.setattr(engine._runner, "step", dies)
    assert isinstance(asyncio.run(outcomes(engine, [request()]))[0], GenerationError)
    assert len(asyncio.run(answer(engine, request(max_tokens=3)))) == 3
    assert engine.stats().restarts == 1
    assert engine.health().alive
    monkeypatch.setattr(engine._runner, "step", dies)
    assert isinstance(asyncio.run(outcomes(engine, [request()]))[0], GenerationError)
    engine._thread.join(20)
    assert not engine.health().alive
    with pytest.raises(EngineStoppedError):
        asyncio.run(answer(engine, request()))


def test_a_cancelled_request_frees_its_slot_within_two_steps(new_engine, monkeypatch):
    engine = new_engine(slots=2)
    runner, step, left = engine._runner, engine._runner.step, []

    def watched(waiting):
        # Whoever was cancelled during the step before must be gone after this one.
        cancelled = [job for job in runner.jobs if job.cancelled.is_set()]
        deliveries = step(waiting)
        left.extend(job in runner.jobs for job in cancelled)
        return deliveries

    monkeypatch.setattr(runner, "step", watched)

    async def scenario():
        other = asyncio.create_task(answer(engine, request(max_tokens=100)))
        events = engine.generate(request("hello", max_tokens=400))
        while not (await anext(events)).token_ids:
            pass
        await events.aclose()
        assert len(await other) == 100

    asyncio.run(scenario())
    assert left == [False]
    assert engine.stats().cancelled == 1


def test_a_prompt_that_comes_again_is_not_computed_again(new_engine, processor):
    engine = new_engine()
    asked = request("hello world what is in this picture ?", RED, max_tokens=5)
    first = asyncio.run(answer(engine, asked))
    before = engine.stats()
    assert asyncio.run(answer(engine, asked)) == first
    after = engine.stats()
    length = before.prompt_tokens
    assert after.prefix_tokens - before.prefix_tokens == length - 1
    # With the picture's tokens in the slot the tower is not even asked.
    assert (after.image_hits, after.image_misses) == (0, 1)
    other = request("hello world what is in this picture ?", Image.new("RGB", (50, 40), "blue"), max_tokens=5)
    asyncio.run(answer(engine, other))
    assert engine.stats().image_misses == 2
    assert engine.stats().prefix_tokens - after.prefix_tokens < 16


def test_a_small_memory_admits_fewer_and_answers_the_same(new_engine, processor):
    requests = several(8)
    model = build_model(processor, context_length=1024)
    expected = asyncio.run(outcomes(new_engine(model), requests))
    room = 4 * PAGE * bytes_per_token(model) / (1 << 30)
    engine = new_engine(model, slots=8, kv_cache_gib=room)
    assert engine.stats().kv_capacity == 4 * PAGE

    async def scenario():
        long = asyncio.create_task(answer(engine, request("one", max_tokens=700)))
        results = await outcomes(engine, requests)
        return results, len(await long)

    results, length = asyncio.run(scenario())
    assert results == expected
    assert length == 700
    with pytest.raises(ServingError, match="one request of 1024 tokens take"):
        new_engine(model, kv_cache_gib=room / 2)


def test_the_context_can_be_shortened(new_engine):
    engine = new_engine(context_length=64)
    assert engine.context_length == 64
    with pytest.raises(RequestError, match="context holds 64 tokens"):
        asyncio.run(answer(engine, request("hello " * 80)))


def test_a_model_that_sees_a_window_only_is_refused(new_engine, processor):
    model = build_model(processor, backbone="starcoder2")
    model.config.text_config.sliding_window = 128
    with pytest.raises(ServingError, match="last 128 tokens only"):
        new_engine(model)
    assert asyncio.run(answer(new_engine(model, batching="serial"), request(max_tokens=2)))


def test_a_model_that_computes_something_else_in_slots_is_refused(new_engine, processor):
    model = build_model(processor)
    model.set_attn_implementation("eager")
    with pytest.raises(ServingError, match="slots"):
        new_engine(model)


def test_a_cache_writes_each_token_to_its_place():
    cache = SlotCache(1)
    cache.resize(3, PAGE)
    generator = torch.Generator().manual_seed(0)
    expected = torch.zeros(3, 2, PAGE, 4)
    filled = [0, 0, 0]
    for slots, counts in [([0, 1, 2], [3, 1, 2]), ([2, 0], [1, 4]), ([0, 1], [1, 1])]:
        states = torch.randn(len(slots), 2, max(counts), 4, generator=generator)
        cache.place(Placement(slots, [filled[slot] for slot in slots], counts))
        keys, values = cache.update(states, -states, 0)
        for index, (slot, count) in enumerate(zip(slots, counts, strict=True)):
            expected[slot, :, filled[slot] : filled[slot] + count] = states[index, :, :count]
            filled[slot] += count
            assert keys[index].equal(expected[slot, :, : keys.shape[2]])
            assert values[index].equal(-expected[slot, :, : keys.shape[2]])
    cache.swap(0, 2, max(filled))
    cache.resize(4, 2 * PAGE)
    assert cache.slot_layers[0].keys[:3, :, :PAGE].equal(expected[[2, 1, 0]])
    cache.clear(1)
    assert not cache.slot_layers[0].keys[1].any()
