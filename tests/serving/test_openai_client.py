"""The official client over the whole surface: what it sends is understood, and what comes back fits its types."""

from __future__ import annotations

import math

import openai
import pytest

from shellv_core.serving.http.chat_bodies import ChatCompletion, ChatCompletionChunk
from shellv_core.serving.http.completion_bodies import Completion
from tests.serving.conftest import PLACES, gateway_before
from tests.serving.tiny_model import data_url, picture

USER = {"role": "user", "content": "what is in this picture ?"}


@pytest.fixture(scope="module", params=PLACES)
def roomy(start_endpoint, request):
    from shellv_core.serving.transformers_engine import EngineConfig

    with start_endpoint(engine_config=EngineConfig(max_waiting=64)) as endpoint:
        if request.param == "direct":
            yield endpoint
        else:
            with gateway_before(endpoint) as gateway:
                yield gateway


@pytest.fixture
def client(roomy):
    with openai.OpenAI(base_url=f"{roomy.url}/v1", api_key="none", max_retries=0) as client:
        yield client


def image(color):
    return {"type": "image_url", "image_url": {"url": data_url(picture(color))}}


def ask(client, messages=(USER,), **options):
    return client.chat.completions.create(model="tiny", messages=list(messages), **{"max_tokens": 8, **options})


def text(completion, index=0):
    return completion.choices[index].message.content


def test_log_probabilities(client):
    completion = ask(client, logprobs=True, top_logprobs=3)
    content = completion.choices[0].logprobs.content
    assert len(content) == completion.usage.completion_tokens == 8
    for each in content:
        assert each.logprob <= 0
        assert len(each.top_logprobs) == 3
        assert each.top_logprobs[0].logprob == pytest.approx(each.logprob)  # greedy
    assert b"".join(bytes(each.bytes) for each in content).decode(errors="replace").lstrip() == text(completion)
    assert ask(client).choices[0].logprobs is None

    chunks = list(ask(client, logprobs=True, top_logprobs=3, stream=True))
    streamed = [
        each for chunk in chunks for choice in chunk.choices if choice.logprobs for each in choice.logprobs.content
    ]
    assert [each.token for each in streamed] == [each.token for each in content]
    for ours, theirs in zip(streamed, content, strict=True):
        assert math.isclose(ours.logprob, theirs.logprob, abs_tol=1e-4)


def test_several_answers(client):
    options = {"n": 3, "temperature": 1.0, "seed": 5}
    completion = ask(client, **options)
    assert [choice.index for choice in completion.choices] == [0, 1, 2]
    assert len({text(completion, index) for index in range(3)}) == 3
    assert text(completion) == text(ask(client, temperature=1.0, seed=5))
    assert completion.usage.completion_tokens == 24
    assert completion.usage.prompt_tokens == ask(client).usage.prompt_tokens

    texts = ["", "", ""]
    reasons = {}
    for chunk in ask(client, **options, stream=True, stream_options={"include_usage": True}):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
            if choice.finish_reason:
                reasons[choice.index] = choice.finish_reason
    assert texts == [text(completion, index) for index in range(3)]
    assert reasons == dict.fromkeys(range(3), "length")
    assert chunk.usage == completion.usage


def test_several_pictures(client):
    def answer(*colors):
        completion = ask(client, [{"role": "user", "content": [*map(image, colors), {"type": "text", "text": "?"}]}])
        return text(completion), completion.usage.prompt_tokens

    (both, two), (swapped, _), (_, one) = answer("red", "blue"), answer("blue", "red"), answer("red")
    assert both != swapped
    assert two > one


def test_what_shapes_the_answer(client):
    plain = text(ask(client))
    banned = ask(client, logprobs=True).choices[0].logprobs.content[0].token
    token_id = ask(client, extra_body={"shellv": {"return_token_ids": True}}).choices[0].shellv["token_ids"][0]
    biased = ask(client, logit_bias={str(token_id): -100}, logprobs=True)
    assert biased.choices[0].logprobs.content[0].token != banned
    often = ask(client, max_tokens=40)
    assert text(ask(client, max_tokens=40, presence_penalty=2.0, frequency_penalty=2.0)) != text(often)
    assert text(ask(client, max_tokens=40, extra_body={"repetition_penalty": 5.0})) != text(often)
    drawn = {"temperature": 2.0, "seed": 3}
    assert text(ask(client, **drawn, extra_body={"top_k": 1})) == plain
    assert text(ask(client, **drawn, extra_body={"min_p": 1.0})) == plain
    assert text(ask(client, **drawn, top_p=1e-9)) == plain
    assert text(ask(client, **drawn)) != plain
    assert ask(client, max_tokens=openai.omit, max_completion_tokens=3).usage.completion_tokens == 3
    assert text(ask(client, user="somebody", stop=["\x00"], extra_body={"min_tokens": 8, "top_k": -1})) == plain


def test_token_ids_add_up(client):
    wanted = {"extra_body": {"shellv": {"return_token_ids": True}}}
    whole = ask(client, **wanted).choices[0].shellv["token_ids"]
    pieces = []
    for chunk in ask(client, **wanted, stream=True):
        for choice in chunk.choices:
            pieces += (getattr(choice, "shellv", None) or {}).get("token_ids", [])
    assert len(whole) == 8
    assert pieces == whole


def test_plain_completions(client):
    options = {"model": "tiny", "prompt": "the cat sits on", "max_tokens": 6}
    completion = client.completions.create(**options, logprobs=2)
    choice = completion.choices[0]
    assert choice.text
    assert completion.usage.completion_tokens == len(choice.logprobs.tokens) == 6
    assert all(len(top) <= 2 for top in choice.logprobs.top_logprobs)
    assert choice.logprobs.text_offset[0] == 0
    streamed = "".join(chunk.choices[0].text for chunk in client.completions.create(**options, stream=True))
    assert streamed == choice.text
    # Nothing is put around it: one token of start at most.
    assert (
        completion.usage.prompt_tokens
        < ask(client, [{"role": "user", "content": options["prompt"]}]).usage.prompt_tokens
    )
    with pytest.raises(openai.BadRequestError, match="suffix is not supported"):
        client.completions.create(**options, suffix="x")


def test_models(client):
    listed = client.models.list().data
    assert [(model.id, model.parent, model.revision) for model in listed] == [("tiny", None, "0" * 64)]
    assert client.models.retrieve("tiny") == listed[0]
    with pytest.raises(openai.NotFoundError, match="did you mean 'tiny'") as caught:
        client.models.retrieve("tinny")
    assert caught.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("options", "param"),
    [
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"extra_body": {"beam_width": 4}}, "beam_width"),
        ({"max_tokens": 10**6}, "messages"),
        ({"messages": [{"role": "assistant", "content": "hi"}]}, "messages[0].role"),
    ],
)
def test_errors(client, options, param):
    with pytest.raises(openai.BadRequestError) as caught:
        ask(client, **options)
    assert (caught.value.type, caught.value.param) == ("invalid_request_error", param)
    assert caught.value.request_id


def test_what_comes_is_what_is_described(client):
    """The answers, which are written by hand, pass the models that the API's description is made of."""
    strict = {"strict": True, "extra": "forbid"}
    for extra in ({}, {"logprobs": True, "top_logprobs": 1, "extra_body": {"shellv": {"return_token_ids": True}}}):
        raw = client.chat.completions.with_raw_response.create(
            model="tiny", messages=[USER], max_tokens=3, **extra
        ).http_response
        ChatCompletion.model_validate_json(raw.content, **strict)
        with client.chat.completions.with_streaming_response.create(
            model="tiny", messages=[USER], max_tokens=3, stream=True, stream_options={"include_usage": True}, **extra
        ) as response:
            lines = [line.removeprefix("data: ") for line in response.iter_lines() if line]
        assert lines[-1] == "[DONE]"
        for line in lines[:-1]:
            ChatCompletionChunk.model_validate_json(line, **strict)
    for stream in (False, True):
        with client.completions.with_streaming_response.create(
            model="tiny", prompt="a", max_tokens=3, logprobs=1, stream=stream
        ) as response:
            for line in response.iter_lines():
                if line and line != "data: [DONE]":
                    Completion.model_validate_json(line.removeprefix("data: "), **strict)


def test_an_adapter_is_a_model_with_a_parent(start_endpoint):
    """The name of an adapter reaches the engine as such; what it does there is the engine's to show."""
    from shellv_core.serving.engine import AdapterInfo
    from shellv_core.serving.models import FixedModels, ServedModel

    class Seen:
        """The engine, and the adapters that it was asked for."""

        def __init__(self, engine):
            self._engine, self.asked = engine, []

        def __getattr__(self, name):
            return getattr(self._engine, name)

        def adapters(self):
            return (AdapterInfo("polite", "1" * 64),)

        def generate(self, request):
            from dataclasses import replace

            self.asked.append(request.adapter)
            return self._engine.generate(replace(request, adapter=None))

    with (
        start_endpoint(
            wrap=Seen,
            served=lambda engine: FixedModels(
                ServedModel(engine, "tiny", "0" * 64), ServedModel(engine, "polite", "1" * 64, "tiny", "polite")
            ),
        ) as endpoint,
        openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none") as client,
    ):
        assert [(each.id, each.parent) for each in client.models.list()] == [("tiny", None), ("polite", "tiny")]
        for name in ("tiny", "polite"):
            response = client.chat.completions.with_raw_response.create(model=name, messages=[USER], max_tokens=2)
            assert response.parse().model == name
            assert response.headers["x-model-revision"] == ("0" if name == "tiny" else "1") * 64
        assert endpoint.engine.asked == [None, "polite"]
