"""Clients that drip, stall, leave, lie about lengths or ask for too much, against the limits that hold them."""

from __future__ import annotations

import contextlib
import json
import logging
import socket
import threading
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import httpx
import pytest

from shellv_core.serving.http.config import (
    ApiConfig,
    BodyLimits,
    ConnectionLimits,
    RequestLimits,
    Timeouts,
)
from shellv_core.serving.images import ImageLimits
from shellv_core.serving.transformers_engine import EngineConfig
from tests.serving.gated_engine import GatedEngine, wait_for
from tests.serving.tiny_model import data_url, picture

USER = {"role": "user", "content": "hi"}
BODY = {"messages": [USER], "max_tokens": 3}


@pytest.fixture(scope="module")
def fenced(start_endpoint):
    """Limits of a second or so, since nobody wants to wait for thirty."""
    config = ApiConfig(
        body=BodyLimits(max_bytes=1 << 20, max_json_marks=5000, timeout_seconds=1.0),
        connection=ConnectionLimits(header_timeout_seconds=1.0, keep_alive_seconds=1, write_stall_seconds=1.0),
        timeouts=Timeouts(idle_seconds=4.0, ping_seconds=0.2),
        request=RequestLimits(images=ImageLimits(decode_processes=1)),
    )
    with start_endpoint(config, EngineConfig(max_waiting=8), wrap=GatedEngine) as endpoint:
        yield endpoint


@pytest.fixture(scope="module")
def narrow(start_endpoint):
    """Room for little, and all the time that it takes."""
    config = ApiConfig(
        body=BodyLimits(max_bytes=1 << 20, max_bytes_in_flight=3 << 20),
        connection=ConnectionLimits(header_timeout_seconds=120.0, max_connections=64),
        request=RequestLimits(images=ImageLimits(decode_processes=1, max_pixels_in_flight=100_000)),
    )
    with start_endpoint(config, EngineConfig(max_waiting=8), wrap=GatedEngine) as endpoint:
        yield endpoint


@pytest.fixture
def narrow_http(narrow):
    with httpx.Client(base_url=narrow.url, timeout=120) as client:
        yield client


@pytest.fixture
def http(fenced):
    with httpx.Client(base_url=fenced.url, timeout=60) as client:
        yield client


def connect(endpoint):
    parts = urlsplit(endpoint.url)
    return socket.create_connection((parts.hostname, parts.port), timeout=30)


def post(body):
    """A whole request for a chat completion."""
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


def idle(endpoint):
    stats = endpoint.engine.stats()
    return stats.running + stats.waiting == 0 and endpoint.engine.started == endpoint.engine.closed


def drip(connection, data):
    """Send byte by byte until the server has closed; False if it let all pass."""
    connection.settimeout(0.1)
    for byte in data:
        try:
            connection.sendall(bytes([byte]))
            if connection.recv(1) == b"":
                return True
        except TimeoutError:
            continue
        except OSError:
            return True
    return False


@pytest.mark.parametrize(
    "begin",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\n",
        b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n",  # a whole request, and then nothing
        b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\nGET /hea",
    ],
)
def test_silent_connections_are_cut(fenced, begin):
    with connect(fenced) as connection:
        connection.sendall(begin)
        while connection.recv(4096):
            pass  # ends, since the server closes; the socket's own timeout would raise


@pytest.mark.parametrize("begin", [b"", b"GET /healthz HTTP/1.1\r\nhost: x\r\n\r\n"])
def test_dripped_headers_are_cut(fenced, begin):
    with connect(fenced) as connection:
        if begin:
            connection.sendall(begin)
            connection.recv(4096)
        assert drip(connection, b"GET /healthz HTTP/1.1\r\nhost: x\r\nx-slow: " + b"y" * 200)


def test_a_dripped_body_is_refused(fenced):
    with connect(fenced) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\ncontent-length: 1000\r\n\r\n")
        connection.settimeout(0.1)
        answer = b""
        while not answer:
            connection.sendall(b"{")
            try:
                answer = connection.recv(4096)
            except TimeoutError:
                continue
        connection.settimeout(30)
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(4096):  # the body may come behind the headers
                answer += piece
    assert answer.startswith(b"HTTP/1.1 408 ")
    assert b"bytes of the request's body came within" in answer


def test_a_body_after_the_answer_keeps_no_connection(fenced):
    with connect(fenced) as connection:
        connection.sendall(b"POST /healthz HTTP/1.1\r\nhost: x\r\ncontent-length: 500\r\n\r\n" + b"x" * 400)
        drip(connection, b"y" * 50)
        connection.settimeout(30)
        # A reset is an end too: it comes if a byte is on its way as the server closes.
        with contextlib.suppress(ConnectionResetError):
            while connection.recv(4096):
                pass


@pytest.mark.parametrize(
    "head",
    [
        b"content-length: 99999999999999999999999\r\n",
        b"content-length: 1048577\r\n",
        b"content-length: -5\r\n",
        b"content-length: 1e3\r\n",
        b"content-length: 5\r\ncontent-length: 6\r\n",
        b"content-length: 5\r\ntransfer-encoding: chunked\r\n",
        b"transfer-encoding: gzip, chunked\r\n",
        b"transfer-encoding: chunked\r\ntransfer-encoding: chunked\r\n",
    ],
)
def test_lying_lengths(fenced, http, head):
    with connect(fenced) as connection:
        connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nhost: x\r\n" + head + b"\r\n{}")
        answer = b""
        while piece := connection.recv(4096):
            answer += piece
    assert answer[9:12] in (b"400", b"413", b"501", b"408"), answer[:60]
    if answer[9:12] != b"501":
        assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["message"]
    assert http.get("/healthz").status_code == 200


@pytest.mark.parametrize("garbage", [b"\x16\x03\x01\x02\x00\x01\x00", b"\r\n" * 9000, b"A" * 70_000])
def test_what_is_not_http(fenced, http, garbage):
    with connect(fenced) as connection:
        connection.sendall(garbage)
        answer = b""
        with contextlib.suppress(ConnectionResetError):
            while piece := connection.recv(4096):
                answer += piece
    assert not answer or answer[9:12] in (b"400", b"431"), answer[:60]
    assert http.get("/healthz").status_code == 200


def test_a_body_of_nothing_but_brackets(http):
    body = b'{"messages": [' + b"[]," * 4000 + b"0]}"
    response = http.post("/v1/chat/completions", content=body, headers={"content-type": "application/json"})
    assert (response.status_code, response.json()["error"]["code"]) == (413, "body_too_complex")
    deep = b"[" * 4000
    response = http.post("/v1/chat/completions", content=deep, headers={"content-type": "application/json"})
    assert response.status_code == 400


def test_bodies_together_are_bounded(narrow, narrow_http):
    """Three that are being answered hold what the server may hold; a fourth is told to come back."""
    padded = {**BODY, "shellv": None, "user": "x", "stop": None}
    content = json.dumps(padded)[:-1] + " " * (1_000_000) + "}"

    def send():
        return narrow_http.post("/v1/chat/completions", content=content, headers={"content-type": "application/json"})

    before = narrow.engine.started
    with narrow.engine.shut(), ThreadPoolExecutor(3) as pool:
        held = [pool.submit(send) for _ in range(3)]
        wait_for(lambda: narrow.engine.started == before + 3)
        refused = send()
        small = narrow_http.post("/tokenize", json={"prompt": "a"})
        narrow.engine._open.set()
        assert [each.result().status_code for each in held] == [200] * 3
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "server_busy")
    assert int(refused.headers["retry-after"]) > 0
    assert small.status_code == 200
    assert send().status_code == 200


def test_pixels_together_are_bounded(narrow, narrow_http):
    large = {"type": "image_url", "image_url": {"url": data_url(picture(size=(250, 250)))}}
    body = {**BODY, "messages": [{"role": "user", "content": [large]}]}
    before = narrow.engine.started
    with narrow.engine.shut(), ThreadPoolExecutor(1) as pool:
        held = pool.submit(narrow_http.post, "/v1/chat/completions", json=body)
        wait_for(lambda: narrow.engine.started == before + 1)
        refused = narrow_http.post("/v1/chat/completions", json=body)
        narrow.engine._open.set()
        assert held.result().status_code == 200
    assert (refused.status_code, refused.headers["retry-after"]) == (429, "2")
    assert narrow_http.post("/v1/chat/completions", json=body).status_code == 200


def test_silence_in_mid_answer(fenced, http):
    with fenced.engine.shut(tokens=2):
        lines = http.post("/v1/chat/completions", json={**BODY, "max_tokens": 9, "stream": True}).text.split("\n\n")
    assert lines[-2] == "data: [DONE]"
    assert json.loads(lines[-3].removeprefix("data: "))["error"]["code"] == "timeout"
    assert ": ping" in lines
    wait_for(lambda: idle(fenced))


@pytest.mark.parametrize(
    ("timeouts", "message"),
    [
        (Timeouts(request_seconds=0.5), "longer than 0.5 seconds"),
        (Timeouts(first_token_seconds=0.5), "no token came for"),
    ],
)
def test_an_answer_that_takes_too_long(start_endpoint, timeouts, message):
    config = ApiConfig(timeouts=timeouts)
    with start_endpoint(config, wrap=GatedEngine) as endpoint, endpoint.engine.shut():
        response = httpx.post(f"{endpoint.url}/v1/chat/completions", json=BODY, timeout=60)
        wait_for(lambda: endpoint.engine.started == endpoint.engine.closed)
    assert (response.status_code, response.json()["error"]["code"]) == (504, "timeout")
    assert message in response.text


def test_a_client_that_does_not_read_is_cut(fenced):
    """A stream of more than what the sockets hold, to a client that takes nothing of it."""
    body = json.dumps(
        {"messages": [USER], "max_tokens": 4000, "n": 4, "stream": True, "logprobs": True, "top_logprobs": 20}
    ).encode()
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        parts = urlsplit(fenced.url)
        connection.connect((parts.hostname, parts.port))
        before, cancelled = fenced.engine.closed, fenced.engine.stats().cancelled
        connection.sendall(post(body))
        wait_for(lambda: fenced.engine.closed == before + 4, 120)
        wait_for(lambda: fenced.engine.stats().cancelled == cancelled + 4)
    wait_for(lambda: idle(fenced))


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("count", [1, 3])
def test_a_client_that_leaves_frees_its_slot_within_two_steps(fenced, stream, count):
    engine = fenced.engine
    model = engine._model
    steps = []
    handle = model.register_forward_hook(lambda *_: steps.append(engine.closed))
    body = json.dumps({"messages": [USER], "max_tokens": 3500, "stream": stream, "n": count}).encode()
    before = engine.closed
    try:
        with connect(fenced) as connection:
            connection.sendall(post(body))
            wait_for(lambda: engine.stats().running)
        wait_for(lambda: idle(fenced))
        assert engine.closed == before + count
    finally:
        handle.remove()
    # Steps that the model made after the API had let go of all of them.
    assert sum(closed == before + count for closed in steps) <= 2


def test_too_many_connections(narrow):
    held = [connect(narrow) for _ in range(64)]
    try:
        refused = httpx.get(f"{narrow.url}/healthz", timeout=60)
    finally:
        for each in held:
            each.close()
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "too_many_connections")
    assert int(refused.headers["retry-after"]) > 0
    wait_for(lambda: httpx.get(f"{narrow.url}/healthz", timeout=60).status_code == 200)


def test_logs_hold_no_content_and_no_address(fenced, http, caplog):
    secret = "swordfish-7421"
    with caplog.at_level(logging.DEBUG):
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": secret}], "max_tokens": 2}),
            (
                "/v1/chat/completions",
                {
                    "messages": [
                        {
                            "role": "user",
                            "content": [{"type": "image_url", "image_url": {"url": f"data:image/png;base64,{secret}"}}],
                        }
                    ]
                },
            ),
            ("/v1/chat/completions", {"messages": [USER], secret: 1}),
            ("/v1/completions", {"prompt": secret, "max_tokens": 2}),
            (f"/v1/{secret}?q={secret}", {}),
        ):
            http.post(path, json=body, headers={"authorization": f"Bearer {secret}"})
    lines = [record.getMessage() for record in caplog.records if record.name.startswith(("shellv_core", "uvicorn"))]
    assert sum("/v1/" in line for line in lines) >= 4
    assert not [line for line in lines if secret in line or "127.0.0.1" in line]


def test_traces_are_continued(http):
    trace, parent = "4bf92f3577b34da6a3ce929d0e0e4736", "00f067aa0ba902b7"
    answer = http.get("/healthz", headers={"traceparent": f"00-{trace}-{parent}-01"}).headers["traceparent"]
    version, same, span, flags = answer.split("-")
    assert (version, same, flags) == ("00", trace, "01")
    assert span != parent
    for bad in ("", "00-" + "0" * 32 + f"-{parent}-01", f"01-{trace}-{parent}-01", f"00-{trace}-{parent}-01 x"):
        fresh = http.get("/healthz", headers={"traceparent": bad}).headers["traceparent"]
        assert fresh.split("-")[1] not in (trace, "0" * 32)


def test_metrics_and_load(fenced, http):
    http.post("/v1/chat/completions", json=BODY)
    http.post("/v1/chat/completions", json={"messages": []})
    text = httpx.get(f"{fenced.operations_url}/metrics").text
    for line in (
        'shellv:num_requests_running{model_name="tiny"} 0.0',
        'shellv:request_success_total{finished_reason="length",model_name="tiny"}',
        'shellv:time_to_first_token_seconds_count{model_name="tiny"}',
        'shellv:inter_token_latency_seconds_bucket{le="0.001",model_name="tiny"}',
        'shellv:e2e_request_latency_seconds_sum{model_name="tiny"}',
        'shellv:request_queue_time_seconds_count{model_name="tiny"}',
        'shellv:http_responses_total{path="/v1/chat/completions",status="400"}',
        'shellv:generation_tokens_total{model_name="tiny"}',
        "shellv:kv_cache_usage_perc",
        "shellv_requests_in_flight 0.0",
        "process_resident_memory_bytes",
    ):
        assert line in text, line
    assert httpx.get(f"{fenced.operations_url}/readyz").json() == {"status": "ok"}
    with (
        fenced.engine.shut(),
        http.stream("POST", "/v1/completions", json={"prompt": "a", "max_tokens": 4000, "stream": True}),
    ):
        load = httpx.get(f"{fenced.operations_url}/internal/load").json()
    wait_for(lambda: idle(fenced))
    assert load == {
        "ready": True,
        "in_flight": 1,
        "models": [
            {"id": "tiny", "revision": "0" * 64, "running": 1, "waiting": 0, "slots": fenced.engine.stats().slots}
        ],
    }


def test_tokens_are_counted(http):
    count = lambda **body: http.post("/tokenize", json=body).json()  # noqa: E731
    text = count(prompt="the cat sits")
    assert text["max_model_len"] == 4096
    assert text["count"] < count(prompt="the cat sits on the red table")["count"]
    answer = http.post("/v1/chat/completions", json=BODY).json()
    assert count(messages=[USER])["count"] == answer["usage"]["prompt_tokens"]
    assert http.post("/tokenize", json={}).status_code == 400
    assert http.post("/tokenize", json={"prompt": "a", "messages": [USER]}).status_code == 400


def test_a_prompt_of_exactly_what_fits(http):
    room = 4096 - http.post("/tokenize", json={"messages": [USER]}).json()["count"]
    body = {"messages": [USER], "stream": True}
    with httpx.stream(
        "POST", f"{http.base_url}/v1/chat/completions", json={**body, "max_tokens": room}, timeout=60
    ) as fits:
        assert fits.status_code == 200
    over = http.post("/v1/chat/completions", json={**body, "max_tokens": room + 1})
    assert (over.status_code, over.json()["error"]["code"]) == (400, "context_length_exceeded")


def test_special_tokens_are_text(http):
    plain = http.post("/tokenize", json={"prompt": "</s>"}).json()["count"]
    assert plain > http.post("/tokenize", json={"prompt": "a"}).json()["count"]
    many = "<image>" * 30 + "</s><s>USER: ASSISTANT:"
    for body in ({"messages": [{"role": "user", "content": many}]}, {"prompt": many}):
        path = "/v1/chat/completions" if "messages" in body else "/v1/completions"
        assert http.post(path, json={**body, "max_tokens": 2}).status_code == 200


def test_no_other_origin_is_let_in(http):
    response = http.options(
        "/v1/chat/completions", headers={"origin": "https://evil.example", "access-control-request-method": "POST"}
    )
    assert response.status_code == 405
    answer = http.get("/v1/models", headers={"origin": "https://evil.example"})
    assert not [name for name in (*response.headers, *answer.headers) if name.startswith("access-control")]


def test_threads_are_left_behind_by_none_of_this(fenced):
    wait_for(lambda: idle(fenced))
    assert sum(thread.name.startswith("pictures") for thread in threading.enumerate()) <= 4
