from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
import torch
from PIL import Image

from shellv_core.serving.engine import (
    EngineStoppedError,
    GenerationError,
    GenerationRequest,
    ImagePart,
    Message,
    QueueFullError,
    QueueTimeoutError,
    RequestError,
    TextPart,
)
from shellv_core.serving.transformers_engine import EngineConfig, TransformersEngine
from tests.serving.tiny_model import build_model

RED = Image.new("RGB", (50, 40), "red")
QUESTION = "what is in this picture ?"


def request(text=QUESTION, image=RED, **options):
    parts = (ImagePart(image), TextPart(text)) if image else (TextPart(text),)
    return GenerationRequest((Message("user", parts),), **options)


async def answer(engine, request):
    return [event async for event in engine.generate(request)]


def text_of(events):
    return "".join(event.text for event in events)


async def until(condition, seconds=20):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        await asyncio.sleep(0.01)


@pytest.fixture(scope="module")
def engine(model, processor):
    return TransformersEngine(model, processor)


@pytest.fixture
def new_engine(model, processor):
    engines = []

    def build(model=model, **options):
        engines.append(TransformersEngine(model, processor, EngineConfig(**options)))
        return engines[-1]

    yield build
    for each in engines:
        asyncio.run(each.drain(0))


def generated(model, processor, image, text, count):
    conversation = [
        {"role": "user", "content": [*([{"type": "image"}] if image else []), {"type": "text", "text": text}]}
    ]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(text=prompt, images=image, return_tensors="pt")
    with torch.inference_mode():
        output = model.generate(**inputs, max_new_tokens=count, do_sample=False)
    return processor.tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()


@pytest.mark.parametrize("batching", ["slots", "serial"])
@pytest.mark.parametrize("image", [RED, Image.new("RGB", (32, 90), "blue"), None])
def test_greedy_answers_equal_those_of_generate(new_engine, model, processor, image, batching):
    events = asyncio.run(answer(new_engine(batching=batching), request(image=image, max_tokens=40)))
    assert text_of(events).strip() == generated(model, processor, image, QUESTION, 40)
    assert events[0].text == ""
    assert (events[-1].completion_tokens, events[-1].finish_reason) == (40, "length")


def test_an_end_token_ends_the_answer(new_engine, processor):
    model = build_model(processor)
    conversation = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    inputs = processor(
        text=processor.apply_chat_template(conversation, add_generation_prompt=True), return_tensors="pt"
    )
    token_ids = model.generate(**inputs, max_new_tokens=6, do_sample=False)[0, -6:].tolist()
    model.generation_config.eos_token_id = [token_ids[-1], processor.tokenizer.eos_token_id]
    events = asyncio.run(answer(new_engine(model=model), request(image=None)))
    count = token_ids.index(token_ids[-1]) + 1
    assert (events[-1].completion_tokens, events[-1].finish_reason) == (count, "stop")
    assert text_of(events) == processor.tokenizer.decode(token_ids[: count - 1]).strip()


def test_seeds_and_strangers_do_not_change_an_answer(engine):
    async def both():
        alone = await answer(engine, request(max_tokens=20, temperature=1.0, seed=5))
        crowd = await asyncio.gather(
            *(answer(engine, request(max_tokens=20, temperature=1.0, seed=seed)) for seed in (5, 6, 5))
        )
        return text_of(alone), [text_of(each) for each in crowd]

    alone, crowd = asyncio.run(both())
    assert crowd[0] == crowd[2] == alone != crowd[1]


def test_unseeded_answers_differ(engine):
    texts = {text_of(asyncio.run(answer(engine, request(max_tokens=20, temperature=1.0)))) for _ in range(3)}
    assert len(texts) == 3


def test_stop_strings_end_the_answer_before_them(engine):
    whole = text_of(asyncio.run(answer(engine, request(max_tokens=40))))
    stop = whole[10:14]
    events = asyncio.run(answer(engine, request(max_tokens=40, stop=(stop,))))
    assert text_of(events) == whole[: whole.index(stop)]
    assert events[-1].finish_reason == "stop"
    assert events[-1].completion_tokens < 40


@pytest.mark.parametrize("beyond", [-1, 0, 1])
def test_the_context_length_is_exact(engine, beyond):
    prompt_tokens = asyncio.run(answer(engine, request(max_tokens=1)))[0].prompt_tokens
    room = engine.context_length - prompt_tokens
    asked = request(max_tokens=room + beyond)
    if beyond > 0:
        with pytest.raises(RequestError, match="context holds 512 tokens") as caught:
            asyncio.run(answer(engine, asked))
        assert caught.value.code == "context_length_exceeded"
    else:
        assert asyncio.run(answer(engine, asked))[-1].completion_tokens == room + beyond


def test_a_prompt_longer_than_the_context(engine):
    with pytest.raises(RequestError, match="context holds 512"):
        asyncio.run(answer(engine, request("hello " * 600)))


def test_the_default_length_is_cut_to_the_context(engine):
    events = asyncio.run(answer(engine, request()))
    assert events[-1].prompt_tokens + events[-1].completion_tokens == engine.context_length


def test_closing_the_generator_frees_the_engine(new_engine):
    engine = new_engine()

    async def scenario():
        events = engine.generate(request(max_tokens=480))
        for _ in range(5):
            await anext(events)
        assert engine.stats().running == 1
        await events.aclose()
        await until(lambda: engine.stats().running == 0, seconds=1)
        return engine.stats()

    stats = asyncio.run(scenario())
    assert (stats.cancelled, stats.finished, stats.waiting) == (1, 0, 0)


def test_a_cancelled_request_that_waits_never_runs(new_engine):
    engine = new_engine(slots=1)

    async def scenario():
        running = engine.generate(request(max_tokens=400))
        await anext(running)
        waiting = asyncio.create_task(answer(engine, request(max_tokens=400)))
        await until(lambda: engine.stats().waiting == 1)
        waiting.cancel()
        await running.aclose()
        await until(lambda: engine.stats().waiting + engine.stats().running == 0)
        return engine.stats()

    assert asyncio.run(scenario()).cancelled == 2


def test_a_full_queue_refuses_and_counts(new_engine):
    engine = new_engine(slots=1, max_waiting=1)

    async def scenario():
        running = [asyncio.create_task(answer(engine, request(max_tokens=400))) for _ in range(2)]
        await until(lambda: not engine.health().ready)
        with pytest.raises(QueueFullError, match="2 requests run or wait already; 2 are allowed") as caught:
            await anext(engine.generate(request()))
        for each in running:
            each.cancel()
        await until(lambda: engine.health().ready)
        await answer(engine, request(max_tokens=2))
        return caught.value, engine.stats()

    refusal, stats = asyncio.run(scenario())
    assert 1 <= refusal.retry_after_seconds <= 60
    assert (stats.rejected, stats.finished) == (1, 1)


def test_requests_run_in_the_order_of_their_arrival(new_engine):
    engine, finished = new_engine(slots=1), []

    async def one(number):
        await answer(engine, request(max_tokens=10))
        finished.append(number)

    async def scenario():
        tasks = []
        for number in range(4):
            tasks.append(asyncio.create_task(one(number)))
            # Admission comes with the first step of the task.
            await asyncio.sleep(0)
        await asyncio.gather(*tasks)

    asyncio.run(scenario())
    assert finished == sorted(finished)


@pytest.mark.parametrize("batching", ["slots", "serial"])
@pytest.mark.parametrize("fault", ["nan", "raises"])
def test_a_failing_request_fails_alone(new_engine, processor, fault, batching):
    model = build_model(processor)
    engine = new_engine(model=model, batching=batching)
    good = model.lm_head.forward

    def bad(hidden_states):
        if fault == "raises":
            raise IndexError("no such thing")
        return good(hidden_states).fill_(float("nan"))

    model.lm_head.forward = bad
    with pytest.raises(GenerationError, match="not finite" if fault == "nan" else "model failed"):
        asyncio.run(answer(engine, request(max_tokens=4)))
    model.lm_head.forward = good
    assert asyncio.run(answer(engine, request(max_tokens=4)))[-1].finish_reason == "length"
    assert engine.stats().failed == 1
    assert engine.health().alive


def test_draining_finishes_what_runs_and_refuses_the_rest(new_engine):
    engine = new_engine()

    async def scenario():
        running = asyncio.create_task(answer(engine, request(max_tokens=100)))
        await until(lambda: engine.stats().running)
        drain = asyncio.create_task(engine.drain(20))
        await asyncio.sleep(0)
        with pytest.raises(EngineStoppedError):
            await anext(engine.generate(request()))
        await drain
        return await running

    assert asyncio.run(scenario())[-1].completion_tokens == 100
    assert not engine.health().alive


def test_a_drain_past_its_deadline_fails_what_is_left(new_engine):
    engine = new_engine(slots=1)

    async def scenario():
        tasks = [asyncio.create_task(answer(engine, request(max_tokens=480))) for _ in range(3)]
        await until(lambda: engine.stats().running and engine.stats().waiting == 2)
        await engine.drain(0)
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(each) for each in asyncio.run(scenario())] == [EngineStoppedError] * 3


def test_a_step_that_hangs_shows_in_health(new_engine, processor):
    model = build_model(processor)
    engine = new_engine(model=model, max_step_seconds=0.1)
    good = model.lm_head.forward

    def slow(hidden_states):
        time.sleep(0.6)
        return good(hidden_states)

    model.lm_head.forward = slow

    async def scenario():
        events = engine.generate(request(max_tokens=2))
        await anext(events)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(0.4):
                await anext(events)
        return engine.health()

    health = asyncio.run(scenario())
    assert not health.alive
    assert "one step takes longer" in health.reason


def test_a_request_that_waits_too_long_is_refused(new_engine):
    engine = new_engine(slots=1, max_wait_seconds=0.05)

    async def scenario():
        running = asyncio.create_task(answer(engine, request(max_tokens=480)))
        await until(lambda: engine.stats().running)
        with pytest.raises(QueueTimeoutError, match=r"for its turn; 0\.05 are allowed") as caught:
            await answer(engine, request())
        running.cancel()
        return caught.value, engine.stats()

    refusal, stats = asyncio.run(scenario())
    assert refusal.retry_after_seconds >= 1
    assert (stats.expired, stats.failed) == (1, 0)


def test_counted_tokens_are_those_of_the_prompt(engine):
    asked = request(max_tokens=1)
    assert asyncio.run(engine.count_tokens(asked.messages)) == asyncio.run(answer(engine, asked))[0].prompt_tokens


def test_min_tokens_bars_the_end_and_stop_strings(new_engine, processor):
    model = build_model(processor)
    engine = new_engine(model=model)
    whole = asyncio.run(answer(engine, request(max_tokens=12)))
    token_ids = [token_id for event in whole for token_id in event.token_ids]
    assert len(token_ids) == 12
    stop = text_of(whole[:4])
    model.generation_config.eos_token_id = token_ids[2]
    barred = new_engine(model=model)
    ended = asyncio.run(answer(barred, request(max_tokens=12)))
    assert (ended[-1].completion_tokens, ended[-1].finish_reason) == (3, "stop")
    forced = asyncio.run(answer(barred, request(max_tokens=12, min_tokens=12, stop=(stop,))))
    assert (forced[-1].completion_tokens, forced[-1].finish_reason) == (12, "length")


def test_logprobs_are_those_of_the_model(engine, model, processor):
    events = asyncio.run(answer(engine, request(image=None, max_tokens=5, logprobs=True, top_logprobs=3)))
    conversation = [{"role": "user", "content": [{"type": "text", "text": QUESTION}]}]
    prompt = processor.apply_chat_template(conversation, add_generation_prompt=True)
    inputs = processor(text=prompt, return_tensors="pt")["input_ids"]
    chosen = torch.tensor([[token_id for event in events for token_id in event.token_ids]])
    with torch.inference_mode():
        logprobs = model(input_ids=torch.cat([inputs, chosen], dim=1)).logits[0].log_softmax(-1)
    reported = [logprob for event in events for logprob in event.logprobs]
    assert [each.token_id for each in reported] == chosen[0].tolist()
    for place, each in enumerate(reported):
        expected = logprobs[inputs.shape[1] - 1 + place]
        assert each.logprob == pytest.approx(float(expected[each.token_id]), abs=1e-4)
        assert [top.token_id for top in each.top] == expected.topk(3).indices.tolist()
        assert each.top[0].logprob == pytest.approx(float(expected.max()), abs=1e-4)
    assert b"".join(each.bytes for each in reported).decode(errors="replace").strip() == text_of(events)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"adapter": "poet"}, "adapter 'poet' is not loaded"),
        ({"logit_bias": {10**6: 1.0}}, "logit_bias names token 1000000; this model's tokens are 0 to"),
        ({"min_tokens": 3, "max_tokens": 2}, "min_tokens=3 is more than max_tokens=2"),
    ],
)
def test_requests_that_the_model_cannot_serve(engine, options, message):
    with pytest.raises(RequestError, match=message):
        asyncio.run(answer(engine, request(**options)))
