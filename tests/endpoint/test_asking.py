import time
from email.utils import formatdate

import pytest

from shellv_core.endpoint.asking import OUT_OF_TIME, ChatRequest, Endpoint, Reply, Usage
from shellv_core.endpoint.client import EndpointError
from shellv_core.endpoint.config import EndpointConfig
from shellv_core.errors import ConfigError
from tests.endpoint.chat_server import UNREADABLE, chat_server

KEY = "a-secret-key"


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with chat_server() as running:
        yield running


def endpoint(server, **values):
    defaults = {"model": "m", "requests_per_minute": 1e6, "retry_seconds": 0.01, "max_retries": 2}
    return Endpoint(EndpointConfig(base_url=server.url, **{**defaults, **values}))


def ask(server, prompts, **values):
    usage = Usage()
    requests = (ChatRequest([{"role": "user", "content": prompt}]) for prompt in prompts)
    return endpoint(server, **values).ask_all(requests, usage), usage


def test_many_are_asked_at_once_and_each_once(server):
    server.pause_seconds = 0.02
    prompts = [str(number) for number in range(60)]
    replies, usage = ask(server, prompts, concurrency=5, input_price=2.0, output_price=10.0)
    assert replies == [Reply(f"re: {prompt}") for prompt in prompts]
    assert set(server.requests.values()) == {1}
    assert 3 <= server.most_at_once <= 5
    assert usage.requests == {"sent": 60}
    assert (usage.input_tokens, usage.output_tokens) == (6000, 3000)
    assert usage.cost == pytest.approx(60 * (100 * 2 + 50 * 10) / 1e6)
    assert server.keys == {f"Bearer {KEY}"}


def test_requests_are_read_as_far_as_they_are_sent(server):
    read = []

    def requests():
        for number in range(50):
            read.append(number)
            yield ChatRequest([{"role": "user", "content": str(number)}])

    replies = endpoint(server, concurrency=4).ask(requests(), Usage())
    next(replies)
    assert len(read) <= 8
    replies.close()


@pytest.mark.parametrize(
    ("step", "sent", "fault"),
    [
        (500, 3, "HTTP 500"),
        (429, 3, "HTTP 429"),
        (408, 3, "HTTP 408"),
        (400, 1, "HTTP 400"),
        (401, 1, "HTTP 401"),
        (404, 1, "HTTP 404"),
        (301, 3, "unreadable answer"),
        ("hang up", 3, "no connection"),
        *((step, 3, "unreadable answer") for step in UNREADABLE),
    ],
)
def test_faults_are_retried_where_that_can_help(server, step, sent, fault):
    server.plan = lambda prompt, attempt: step if prompt == "bad" or (attempt < 2 and sent == 3) else None
    replies, usage = ask(server, ["bad", "good"])
    assert replies == [Reply(fault=fault), Reply("re: good")]
    assert usage.requests["sent"] == sent + (3 if sent == 3 else 1)
    assert usage.requests["failed"] == 1


@pytest.mark.parametrize("step", ["stall", "drip"])
def test_a_silent_or_endless_answer_is_given_up(server, step):
    server.plan = lambda prompt, attempt: step if prompt == "bad" else None
    start = time.monotonic()
    replies, _ = ask(server, ["bad", *map(str, range(5))], timeout_seconds=0.3, max_retries=1)
    assert time.monotonic() - start < 5
    assert replies[0] == Reply(fault="timeout")
    assert not any(reply.fault for reply in replies[1:])


def test_the_bound_of_a_question_ends_its_retries(server):
    server.plan = lambda prompt, attempt: 500
    start = time.monotonic()
    replies, usage = ask(server, ["a"], retry_seconds=0.2, max_retries=50, question_seconds=1.0)
    assert time.monotonic() - start < 3
    assert replies == [Reply(fault="HTTP 500")]
    assert 2 <= usage.requests["sent"] <= 4


def test_the_bound_of_all_questions_holds_with_exact_counts(server):
    server.plan = lambda prompt, attempt: None if int(prompt) < 10 else "stall"
    start = time.monotonic()
    replies, usage = ask(server, map(str, range(400)), total_seconds=1.5, concurrency=4)
    assert time.monotonic() - start < 6
    assert [reply.text for reply in replies[:10]] == [f"re: {number}" for number in range(10)]
    assert len(replies) == 400
    assert sum(bool(reply.fault) for reply in replies) == usage.requests["failed"] == 390
    assert {reply.fault for reply in replies[20:]} == {OUT_OF_TIME}


@pytest.mark.parametrize("form", ["seconds", "date"])
def test_retry_after_is_waited_for(server, form):
    server.plan = lambda prompt, attempt: 429 if not attempt else None
    server.headers = {"retry-after": "1.2" if form == "seconds" else formatdate(time.time() + 2.5, usegmt=True)}
    start = time.monotonic()
    replies, _ = ask(server, ["a"])
    assert replies == [Reply("re: a")]
    assert time.monotonic() - start > 1.1


def test_a_pause_that_ends_too_late_is_not_waited_for(server):
    server.plan = lambda prompt, attempt: 429
    server.headers = {"retry-after": "3600"}
    start = time.monotonic()
    replies, usage = ask(server, ["a"], question_seconds=30)
    assert time.monotonic() - start < 5
    assert replies == [Reply(fault="HTTP 429")]
    assert usage.requests == {"sent": 1, "failed": 1}


def test_requests_are_spaced(server):
    start = time.monotonic()
    ask(server, map(str, range(7)), requests_per_minute=1200.0)
    assert time.monotonic() - start >= 6 * 60 / 1200


def test_answers_are_cached_by_content_and_faults_are_not(server, tmp_path):
    server.plan = lambda prompt, attempt: 400 if prompt == "bad" and not attempt else None
    cache = {"cache_path": str(tmp_path / "cache")}
    first, _ = ask(server, ["bad", "good"], **cache)
    again, usage = ask(server, ["bad", "good"], **cache)
    assert (first[0].fault, again[0].text) == ("HTTP 400", "re: bad")
    assert usage.requests == {"cached": 1, "sent": 1}
    assert server.requests == {"bad": 2, "good": 1}
    _, usage = ask(server, ["good"], **cache, temperature=0.1)
    assert usage.requests == {"sent": 1}, "other settings, another answer"


def test_what_is_sent(server):
    usage = Usage()
    request = ChatRequest([{"role": "user", "content": "a"}], max_tokens=7, seed=5)
    endpoint(server, temperature=0.0, body={"top_p": 0.5}).ask_all([request], usage)
    endpoint(server, body={"max_tokens": None, "max_completion_tokens": 9}).ask_all([request], usage)
    first, second = server.bodies
    assert {key: first[key] for key in first if key != "messages"} == {
        "model": "m", "max_tokens": 7, "temperature": 0.0, "seed": 5, "top_p": 0.5,
    }  # fmt: skip
    assert (second.get("max_tokens"), second["max_completion_tokens"]) == (None, 9)


def test_half_a_surrogate_pair_can_be_kept(server):
    server.answer = lambda prompt, body: "a\ud800b"
    replies, _ = ask(server, ["a"])
    assert replies[0].text.encode() == b"a?b"


def test_the_key_is_in_no_message(server, monkeypatch):
    server.plan = lambda prompt, attempt: 401
    import asyncio

    from shellv_core.endpoint.client import EndpointClient

    with pytest.raises(EndpointError, match=r"no, Bearer \*\*\*") as fault:
        asyncio.run(EndpointClient(server.url, KEY).complete([{"role": "user", "content": "a"}]))
    assert KEY not in str(fault.value)
    assert KEY not in repr(EndpointConfig(model="m"))
    monkeypatch.delenv("OPENAI_API_KEY")
    with pytest.raises(ConfigError, match="OPENAI_API_KEY is not set"):
        endpoint(server)
    assert ask(server, ["a"], api_key_variable="")[0] == [Reply(fault="HTTP 401")]
    assert None in server.keys


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"model": ""}, "no model is named"),
        ({"base_url": "host/v1"}, "no address"),
        ({"base_url": "http://u:p@h/v1"}, "user"),
    ],
)
def test_settings_that_cannot_work(server, values, message):
    with pytest.raises(ConfigError, match=message) as fault:
        Endpoint(EndpointConfig(**{"base_url": server.url, "model": "m", **values}))
    assert "u:p" not in str(fault.value)


def test_access_is_checked(server):
    endpoint(server).check_access()
    with pytest.raises(EndpointError, match="does not answer"):
        Endpoint(EndpointConfig(base_url="http://127.0.0.1:9/v1", model="m", retry_seconds=0.01)).check_access()
