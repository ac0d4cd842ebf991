from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import openai
import pytest

from tests.serving.test_images import png_of_claimed_size
from tests.serving.tiny_model import data_url, picture

RED = data_url(picture("red"))
LONG = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 2500}


@pytest.fixture
def client(endpoint):
    with openai.OpenAI(base_url=f"{endpoint.url}/v1", api_key="none", max_retries=0) as client:
        yield client


@pytest.fixture
def http_client(endpoint):
    with httpx.Client(base_url=endpoint.url, timeout=60) as client:
        yield client


def about(url=RED, text="what is in this picture ?"):
    return [
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]}
    ]


def chat(http_client, **body):
    return http_client.post("/v1/chat/completions", json=body)


def fault(response):
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def wait_until_idle(endpoint, seconds=2.0):
    deadline = time.monotonic() + seconds
    while (stats := endpoint.engine.stats()).running + stats.waiting:
        assert time.monotonic() < deadline, stats
        time.sleep(0.01)


def test_a_question_in_text(client):
    completion = client.chat.completions.create(
        model="tiny", messages=[{"role": "user", "content": "what is this ?"}], max_tokens=12
    )
    assert completion.choices[0].message.content
    assert completion.choices[0].finish_reason == "length"
    assert completion.usage.completion_tokens == 12
    assert completion.usage.total_tokens == completion.usage.prompt_tokens + 12


def test_the_picture_reaches_the_model(client):
    def answer(url):
        completion = client.chat.completions.create(model="tiny", messages=about(url), max_tokens=12)
        return completion.choices[0].message.content, completion.usage.prompt_tokens

    red, red_tokens = answer(RED)
    blue, blue_tokens = answer(data_url(picture("blue", format="JPEG"), "image/jpeg"))
    assert red != blue
    assert red_tokens == blue_tokens
    assert answer(RED)[0] == red


@pytest.mark.parametrize("options", [{}, {"temperature": 1.2, "seed": 7, "top_p": 0.9}, {"stop": ["a", "e"]}])
def test_a_stream_adds_up_to_the_whole_answer(client, options):
    arguments = {"model": "tiny", "messages": about(), "max_tokens": 30, **options}
    whole = client.chat.completions.create(**arguments)
    chunks = list(client.chat.completions.create(**arguments, stream=True, stream_options={"include_usage": True}))
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == whole.choices[0].message.content
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert len({chunk.id for chunk in chunks}) == 1


def test_the_bytes_of_a_stream(http_client):
    with http_client.stream(
        "POST", "/v1/chat/completions", json={"messages": about(), "max_tokens": 3, "stream": True}
    ) as response:
        events = response.read().decode().split("\n\n")
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-model-revision"] == "0" * 64
    assert events[-2:] == ["data: [DONE]", ""]
    assert all("usage" not in json.loads(event.removeprefix("data: ")) for event in events[:-2])


def test_models_and_health(client, http_client):
    model = client.models.list().data[0]
    assert (model.id, model.revision, model.context_length) == ("tiny", "0" * 64, 4096)
    assert http_client.get("/healthz").json() == http_client.get("/readyz").json() == {"status": "ok"}


def test_request_ids(http_client):
    assert http_client.get("/healthz", headers={"x-request-id": "my-id.1"}).headers["x-request-id"] == "my-id.1"
    made = http_client.get("/healthz", headers={"x-request-id": "not ok; drop"}).headers["x-request-id"]
    assert len(made) == 32
    assert chat(http_client, messages=[]).headers["x-request-id"]


USER = {"role": "user", "content": "hi"}
TEXT = {"type": "text", "text": "hi"}


@pytest.mark.parametrize(
    ("body", "param", "message"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({}, "messages", "required"),
        ({"messages": "hi"}, "messages", "valid list"),
        ({"messages": [USER], "temperature": -1}, "temperature", "greater than or equal to 0"),
        ({"messages": [USER], "temperature": "1"}, "temperature", "valid number"),
        ({"messages": [USER], "top_p": 0}, "top_p", "greater than 0"),
        ({"messages": [USER], "max_tokens": 0}, "max_tokens", "greater than or equal to 1"),
        ({"messages": [USER], "max_tokens": 1.5}, "max_tokens", "valid integer"),
        ({"messages": [USER], "max_tokens": 1, "max_completion_tokens": 1}, "max_tokens", "not both"),
        ({"messages": [USER], "n": 5}, "n", "less than or equal to 4"),
        ({"messages": [USER], "stop": ["a"] * 5}, "stop", "at most 4"),
        ({"messages": [USER], "stop": [""]}, "stop[0]", "at least 1 character"),
        ({"messages": [USER], "stop": 5}, "stop", "valid string"),
        ({"messages": [USER], "seed": 2**63}, "seed", "less than"),
        ({"messages": [USER], "temprature": 1}, "temprature", "did you mean 'temperature'"),
        ({"messages": [USER], "tools": []}, "tools", "not supported by this model"),
        ({"messages": [USER], "response_format": {"type": "json_object"}}, "response_format", "not supported by this"),
        ({"messages": [USER], "top_logprobs": 2}, "top_logprobs", "only allowed with logprobs"),
        ({"messages": [USER], "min_tokens": 9, "max_tokens": 3}, "min_tokens", "max_tokens 3"),
        ({"messages": [USER], "logit_bias": {"x": 1}}, "logit_bias.x", "should match pattern"),
        ({"messages": [USER], "logit_bias": {"99999": 1}}, "logit_bias", "tokens are 0 to"),
        ({"messages": [USER], "logit_bias": {"5": 101}}, "logit_bias.5", "less than or equal to 100"),
        ({"messages": [USER], "top_k": -2}, "top_k", "greater than or equal to -1"),
        ({"messages": [USER], "repetition_penalty": 0}, "repetition_penalty", "greater than 0"),
        ({"messages": [USER], "frequency_penalty": 3}, "frequency_penalty", "less than or equal to 2"),
        ({"messages": [USER], "shellv": {"return_tokens": True}}, "shellv.return_tokens", "not a parameter"),
        ({"messages": [USER], **{f"x{i}": 1 for i in range(70)}}, None, "no object here has more than 64"),
        ({"messages": [USER], "stream_options": {}}, "stream_options", "only allowed with stream"),
        ({"messages": [{"role": "robot", "content": "hi"}]}, "messages[0].role", "'system', 'user' or 'assistant'"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "required"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content", "valid string"),
        ({"messages": [{"role": "user", "content": []}]}, "messages[0].content", "at least 1"),
        ({"messages": [{**USER, "name": "bob"}]}, "messages[0].name", "not a parameter"),
        ({"messages": [{"role": "user", "content": [{"type": "video"}]}]}, "messages[0].content[0]", "expected tags"),
        (
            {"messages": [{"role": "user", "content": [TEXT, {"type": "text"}]}]},
            "messages[0].content[1].text",
            "required",
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": RED}]}]},
            "messages[0].content[0].image_url",
            "valid dictionary",
        ),
        ({"messages": [USER, {"role": "assistant", "content": "hi"}]}, "messages[1].role", "must be the user's"),
        (
            {"messages": [{"role": "assistant", "content": about()[0]["content"]}, USER]},
            "messages[0].content[0]",
            "pictures belong into user messages",
        ),
        ({"messages": [{"role": "system", "content": "be kind"}, USER]}, "messages", "template refuses"),
        ({"messages": [{"role": "user", "content": "x" * (257 << 10)}]}, "messages", "262144 are allowed"),
        ({"messages": [{"role": "user", "content": about()[0]["content"][:1] * 9}]}, "messages", "8 are allowed"),
        ({"messages": [USER] * 257}, "messages", "at most 256"),
    ],
)
def test_bad_requests_name_the_field(http_client, body, param, message):
    response = chat(http_client, **body)
    error = fault(response)
    assert response.status_code == 400, response.text
    assert (error["type"], error["param"]) == ("invalid_request_error", param)
    assert message in error["message"]


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://127.0.0.1:1/a.png", "remote_image_refused"),
        ("file:///etc/passwd", "invalid_image_url"),
        (data_url(picture(format="JPEG"), "image/png"), "invalid_image"),
        (data_url(picture(size=(300, 300), format="JPEG")[:-100], "image/jpeg"), "invalid_image"),
        (data_url(png_of_claimed_size(8000, 8000)), "image_too_large"),
        ("data:image/png;base64,????", "invalid_base64"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_bad_pictures(http_client, url, code, stream):
    response = chat(http_client, messages=about(url), stream=stream)
    error = fault(response)
    assert (response.status_code, error["code"]) == (400, code)
    assert error["param"] == "messages[0].content[0].image_url.url"


@pytest.mark.parametrize(
    "content",
    [
        b"{",
        b"",
        b"[]",
        b"null",
        b'"hi"',
        b"\xff\xfe{}",
        b"[" * 90000,
        b'{"messages": [{"role": "user", "content": "\\ud800"}]}',
        b'{"messages": [{"role": "user", "content": "hi"}], "stop": "\\udc00"}',
        b'{"messages": [{"role": "user", "content": "hi"}], "\\ud800": 1}',
        b'{"messages": [{"role": "user", "content": "hi"}], "model": "\\ud800"}'.replace(b'"hi"', b"7"),
    ],
)
def test_bodies_that_are_no_request(http_client, content):
    response = http_client.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})
    assert response.status_code == 400, response.text
    fault(response)


def test_a_body_that_is_not_declared_as_json(http_client):
    response = http_client.post("/v1/chat/completions", content=json.dumps({"messages": [USER]}))
    assert response.status_code == 400


def test_unknown_models_paths_and_methods(http_client):
    response = chat(http_client, model="tony", messages=[USER])
    assert (response.status_code, fault(response)["code"]) == (404, "model_not_found")
    assert "did you mean 'tiny'" in response.text
    assert http_client.get("/v1/nothing").status_code == 404
    fault(http_client.get("/v1/nothing"))
    response = http_client.get("/v1/chat/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST")
    fault(response)


def test_the_context_length(http_client):
    response = chat(http_client, messages=[USER], max_tokens=4096)
    assert (response.status_code, fault(response)["code"]) == (400, "context_length_exceeded")


def test_special_tokens_in_text_open_no_image_slot(http_client):
    response = chat(http_client, messages=[{"role": "user", "content": "<image>" * 30 + "</s>"}], max_tokens=2)
    assert response.status_code == 200


def test_a_body_over_the_limit(http_client):
    large = {"messages": [{"role": "user", "content": "x" * (5 << 20)}]}
    response = chat(http_client, **large)
    assert (response.status_code, fault(response)["code"]) == (413, "body_too_large")

    def chunks():
        for _ in range(5 * 64):
            yield b"x" * (16 << 10)

    response = http_client.post("/v1/chat/completions", content=chunks())
    assert response.status_code == 413


def test_a_body_that_does_not_arrive(endpoint):
    connection = http.client.HTTPConnection(urlsplit(endpoint.url).netloc, timeout=20)
    connection.putrequest("POST", "/v1/chat/completions")
    connection.putheader("content-length", "1000")
    connection.endheaders(b"{")
    response = connection.getresponse()
    assert response.status == 408
    assert json.loads(response.read())["error"]["code"] == "request_timeout"
    connection.close()


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_engine(endpoint, http_client, stream):
    before = endpoint.engine.stats().cancelled
    host, port = urlsplit(endpoint.url).netloc.split(":")
    body = json.dumps({**LONG, "stream": stream}).encode()
    with socket.create_connection((host, int(port))) as connection:
        head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
        head += f"content-length: {len(body)}\r\n\r\n"
        connection.sendall(head.encode() + body)
        while not endpoint.engine.stats().running:
            time.sleep(0.01)
        if stream:
            assert connection.recv(10).startswith(b"HTTP/1.1")
    wait_until_idle(endpoint)
    assert endpoint.engine.stats().cancelled == before + 1
    assert chat(http_client, messages=[USER], max_tokens=2).status_code == 200


def test_a_full_queue(endpoint, http_client):
    wait_until_idle(endpoint)
    release = threading.Event()

    def hold():
        with httpx.stream("POST", f"{endpoint.url}/v1/chat/completions", json={**LONG, "stream": True}, timeout=60):
            release.wait(30)

    threads = [threading.Thread(target=hold) for _ in range(3)]
    for thread in threads:
        thread.start()
    while endpoint.engine.health().ready:
        time.sleep(0.01)
    refused = chat(http_client, messages=[USER])
    readiness = http_client.get("/readyz")
    health = http_client.get("/healthz")
    release.set()
    for thread in threads:
        thread.join()
    assert (refused.status_code, fault(refused)["code"]) == (429, "queue_full")
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert (readiness.status_code, health.status_code) == (503, 200)
    wait_until_idle(endpoint)


def test_many_clients_get_answers_or_429(endpoint):
    def ask(_):
        return httpx.post(
            f"{endpoint.url}/v1/chat/completions", json={"messages": [USER], "max_tokens": 3}, timeout=60
        ).status_code

    with ThreadPoolExecutor(16) as pool:
        codes = set(pool.map(ask, range(48)))
    assert codes <= {200, 429}
    assert 200 in codes
    wait_until_idle(endpoint)


def test_a_failure_in_the_middle_of_a_stream(endpoint, http_client, monkeypatch):
    head = endpoint.engine._model.lm_head
    good, calls = head.forward, []

    def bad(hidden_states):
        calls.append(1)
        return good(hidden_states) * (float("nan") if len(calls) > 3 else 1)

    monkeypatch.setattr(head, "forward", bad)
    events = chat(http_client, messages=[USER], max_tokens=20, stream=True).text.split("\n\n")
    assert events[-2] == "data: [DONE]"
    assert json.loads(events[-3].removeprefix("data: "))["error"]["code"] == "generation_failed"
    response = chat(http_client, messages=[USER])
    assert (response.status_code, fault(response)["type"]) == (500, "server_error")


def test_the_schema_names_the_error_body(http_client):
    schema = http_client.get("/openapi.json").json()
    responses = schema["paths"]["/v1/chat/completions"]["post"]["responses"]
    assert set(responses) == {"200", "400", "401", "403", "404", "408", "413", "429", "500", "503", "504"}
    for status, response in responses.items():
        content = response["content"]["application/json"]["schema"]["$ref"].rpartition("/")[2]
        assert content == ("ChatCompletion" if status == "200" else "ErrorResponse")
    assert not any("422" in each["responses"] for path in schema["paths"].values() for each in path.values())
    assert http_client.get("/docs").status_code == 404
