"""What other servers are asked and how their answers are read: vLLM, and one that knows OpenAI's fields alone."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from PIL import Image

from shellv_core.endpoint.client import EndpointClient, EndpointError
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
from shellv_core.serving.gateway.remote import RemoteEngine, describe
from shellv_core.serving.gateway.wire import ConnectionLostError, engine_error

USAGE = {"prompt_tokens": 12, "total_tokens": 12}
HI = {"token": "Hi", "logprob": -0.1, "bytes": [72, 105]}


class Server:
    """A server of another make: `chunks` is what it streams, `seen` what it was asked."""

    def __init__(self, owner):
        self.owner, self.seen, self.chunks, self.fault, self.done = owner, [], [], None, True
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                card = {"object": "model", "owned_by": server.owner, "root": "/models/llava", "max_model_len": 2048}
                cards = [{**card, "id": "llava", "parent": None}, {**card, "id": "polite", "parent": "llava"}]
                self.answer(200, "application/json", json.dumps({"data": cards}))

            def do_POST(self):
                server.seen.append((self.path, json.loads(self.rfile.read(int(self.headers["content-length"])))))
                if server.fault:
                    self.answer(server.fault[0], "application/json", json.dumps({"error": server.fault[1]}))
                    return
                events = "".join(f"data: {json.dumps(chunk)}\n\n" for chunk in server.chunks)
                events += "data: [DONE]\n\n" if server.done else ""
                self.answer(200, "text/event-stream", events)

            def answer(self, status, kind, body):
                self.send_response(status)
                self.send_header("content-type", kind)
                self.send_header("content-length", str(len(body.encode())))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *arguments):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_address[1]}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def ask(self, request):
        async def collect():
            engine = RemoteEngine(self.url, await describe(EndpointClient(self.url), "llava"))
            events = [event async for event in engine.generate(request)]
            await engine.drain(1)
            return events, engine

        return asyncio.run(collect())


@pytest.fixture
def serve():
    servers = []

    def start(owner):
        servers.append(Server(owner))
        return servers[-1]

    yield start
    for server in servers:
        server.http.shutdown()
        server.http.server_close()


def chunk(usage=None, **choice):
    body = {"object": "chat.completion.chunk", "choices": [{"index": 0, "finish_reason": None, **choice}]}
    return body if usage is None else {**body, "usage": {**USAGE, "completion_tokens": usage}}


def end(usage):
    return {"choices": [], "usage": {**USAGE, "completion_tokens": usage}}


def question(**options):
    image = Image.effect_noise((9, 7), 80).convert("RGB")
    parts = (ImagePart(image), TextPart("what is this ?"))
    return image, GenerationRequest((Message("user", parts),), **options)


def test_vllm(serve):
    server = serve("vllm")
    server.chunks = [
        chunk(0, delta={"role": "assistant", "content": ""}, logprobs=None),
        chunk(1, delta={"content": "Hi"}, logprobs={"content": [{**HI, "top_logprobs": [HI]}]}, token_ids=[7]),
        chunk(2, delta={"content": ""}, token_ids=[2], finish_reason="stop", stop_reason=None),
        end(2),
    ]
    image, request = question(
        adapter="polite", logprobs=True, top_logprobs=1, top_k=5, min_p=0.1, seed=3, stop=("x",), logit_bias={7: 2.0}
    )
    events, engine = server.ask(request)
    body = server.seen[-1][1]
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    assert url.startswith("data:image/png;base64,")
    sent = Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2])))
    assert sent.tobytes() == image.tobytes()
    assert server.seen[-1][0] == "/v1/chat/completions"
    expected = {
        "model": "polite", "stream": True, "return_token_ids": True, "temperature": 0.0, "top_k": 5, "min_p": 0.1,
        "repetition_penalty": 1.0, "seed": 3, "stop": ["x"], "logit_bias": {"7": 2.0}, "top_logprobs": 1,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
    }  # fmt: skip
    assert {name: body.get(name) for name in expected} == expected

    assert [(each.text, each.completion_tokens, each.token_ids) for each in events] == [
        ("", 0, ()), ("Hi", 1, (7,)), ("", 2, (2,)), ("", 2, ()),
    ]  # fmt: skip
    assert {each.prompt_tokens for each in events} == {12}
    assert events[-1].finish_reason == "stop"
    told = events[1].logprobs[0]
    assert (told.token_id, told.token, told.bytes, told.logprob) == (7, "Hi", b"Hi", -0.1)
    assert told.top[0].token == "Hi"
    assert (engine.context_length, [each.name for each in engine.adapters()]) == (2048, ["polite"])
    assert engine.stats().finished == 1


def test_a_server_that_knows_openais_fields_alone(serve):
    server = serve("somebody")
    server.chunks = [
        chunk(delta={"role": "assistant", "content": ""}),
        chunk(delta={"content": "a"}),
        chunk(delta={"content": "b"}),
        chunk(delta={}, finish_reason="length"),
        end(2),
    ]
    events, _ = server.ask(question(max_tokens=2)[1])
    assert [(each.text, each.completion_tokens) for each in events] == [("", 0), ("a", 1), ("b", 2), ("", 2)]
    assert (events[0].prompt_tokens, events[-1].prompt_tokens) == (0, 12)
    assert not {"top_k", "min_p", "repetition_penalty", "return_token_ids", "shellv"} & set(server.seen[-1][1])
    with pytest.raises(RequestError, match="top_k is not supported") as caught:
        server.ask(question(top_k=3)[1])
    assert caught.value.param == "top_k"


def test_a_text_is_continued_as_it_is(serve):
    server = serve("vllm")
    logprobs = {"tokens": ["b"], "token_logprobs": [-0.5], "top_logprobs": [{"b": -0.5, "c": -1.5}]}
    server.chunks = [chunk(1, text="b", logprobs=logprobs, token_ids=[4]), chunk(1, text="", finish_reason="length")]
    request = GenerationRequest((Message("text", (TextPart("a"),)),), logprobs=True, top_logprobs=2)
    events, _ = server.ask(request)
    assert server.seen[-1][0] == "/v1/completions"
    assert (server.seen[-1][1]["prompt"], server.seen[-1][1]["logprobs"]) == ("a", 2)
    assert [each.token for each in events[1].logprobs[0].top] == ["b", "c"]


@pytest.mark.parametrize(
    ("chunks", "done", "error"),
    [
        ([], True, GenerationError),  # an end without an answer
        ([chunk(0, delta={"content": "a"})], False, ConnectionLostError),
        ([{"choices": [{"delta": 5}]}], True, GenerationError),
        ([{"error": {"message": "it broke", "code": "generation_failed"}}], True, GenerationError),
        ([{"error": {"message": "bye", "code": "shutting_down"}}], True, EngineStoppedError),
        ([chunk(0, delta={}, finish_reason="abort")], True, GenerationError),
    ],
)
def test_answers_that_are_none(serve, chunks, done, error):
    server = serve("vllm")
    server.chunks, server.done = chunks, done
    with pytest.raises(error):
        server.ask(question()[1])


@pytest.mark.parametrize(
    ("status", "code", "kind"),
    [
        (400, "context_length_exceeded", RequestError),
        (404, None, RequestError),
        (413, None, RequestError),
        (401, None, GenerationError),
        (429, "queue_full", QueueFullError),
        (500, None, GenerationError),
        (503, "queue_timeout", QueueTimeoutError),
        (503, None, EngineStoppedError),
        (504, "timeout", GenerationError),
    ],
)
def test_refusals(serve, status, code, kind):
    server = serve("vllm")
    server.fault = status, {"message": "because", "param": "messages", "code": code or status}
    with pytest.raises(kind) as caught:
        server.ask(question()[1])
    assert type(caught.value) is kind
    if kind is RequestError:
        assert (caught.value.param, caught.value.code, str(caught.value)) == ("messages", code, "because")


def test_nobody_there():
    error = engine_error(EndpointError("nobody", reached=False))
    assert type(error) is EngineStoppedError
    assert type(engine_error(EndpointError("gone"))) is ConnectionLostError
    assert engine_error(EndpointError("full", 429, 2.2)).retry_after_seconds == 2
