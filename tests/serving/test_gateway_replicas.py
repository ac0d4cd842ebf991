"""Several servers of one model: where requests go, and what happens when one fails."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from types import SimpleNamespace

import pytest
from PIL import Image

from shellv_core.serving.engine import (
    EngineStoppedError,
    GenerationError,
    GenerationRequest,
    ImagePart,
    Message,
    NotReadyError,
    QueueFullError,
    RequestError,
    TextPart,
    TokenEvent,
)
from shellv_core.serving.gateway import replica as replica_module
from shellv_core.serving.gateway.replica import Breaker, Replica
from shellv_core.serving.gateway.replicated import ReplicatedEngine
from shellv_core.serving.gateway.wire import ConnectionLostError
from tests.serving.gated_engine import wait_for

EVENTS = [TokenEvent("", 5, 0), TokenEvent("a", 5, 1), TokenEvent("b", 5, 2), TokenEvent("", 5, 2, "length")]


class Scripted:
    """A server's engine that fails with `error` after `after` events, as long as there is one."""

    context_length = 64
    model = SimpleNamespace(name="m", revision="0" * 64, context_length=64, adapters=())

    def __init__(self, error=None, after=0):
        self.error, self.after, self.asked = error, after, 0

    async def generate(self, request):
        self.asked += 1
        for index, event in enumerate(EVENTS):
            if self.error and index == self.after:
                raise self.error
            yield event

    async def drain(self, seconds):
        pass


@contextlib.contextmanager
def replicated(*engines):
    """An engine before servers that answer as scripted and are never looked at."""
    replicas = [Replica(f"http://server-{number}", engine=engine) for number, engine in enumerate(engines)]
    for each in replicas:
        each.ready = True
        each.poll = lambda client: asyncio.sleep(0)
    engine = ReplicatedEngine(lambda: replicas)
    engine.await_look(30)
    engine._replicas = replicas
    yield engine, replicas
    asyncio.run(engine.drain(0))


def request(text="hello", color=None):
    picture = [ImagePart(Image.new("RGB", (8, 8), color))] if color else []
    return GenerationRequest((Message("user", (*picture, TextPart(text))),))


def events_of(engine, wanted=None):
    async def collect():
        return [event async for event in engine.generate(wanted or request())]

    return asyncio.run(collect())


@pytest.mark.parametrize(
    ("error", "after"),
    [
        (EngineStoppedError("stopping"), 0),
        (QueueFullError("full", 3), 0),
        (GenerationError("it broke"), 0),
        (ConnectionLostError("gone"), 1),  # its turn had come, and no token
    ],
)
def test_before_the_first_token_a_request_moves_on_and_nobody_sees_it(error, after):
    for _ in range(6):  # whichever is drawn first
        with replicated(Scripted(error, after), Scripted()) as (engine, _):
            assert events_of(engine) == EVENTS


def test_after_the_first_token_it_stays_and_fails():
    bad, good = Scripted(ConnectionLostError("gone"), 2), Scripted()
    with replicated(bad, good) as (engine, replicas):
        replicas[1].breaker.failures, replicas[1].breaker.open_until = 3, time.monotonic() + 100
        with pytest.raises(ConnectionLostError):
            events_of(engine)
    assert good.asked == 0


def test_a_fault_of_the_request_moves_nowhere():
    engines = [Scripted(RequestError("no", "messages")) for _ in range(3)]
    with replicated(*engines) as (engine, _), pytest.raises(RequestError):
        events_of(engine)
    assert sum(each.asked for each in engines) == 1


def test_a_request_that_brings_servers_down_does_not_get_them_all():
    engines = [Scripted(ConnectionLostError("gone")) for _ in range(5)]
    with replicated(*engines) as (engine, _), pytest.raises(ConnectionLostError):
        events_of(engine)
    assert sum(each.asked for each in engines) == 2


def test_where_all_are_full_that_is_said():
    engines = [Scripted(QueueFullError("full", 7)) for _ in range(3)]
    with replicated(*engines) as (engine, _), pytest.raises(QueueFullError) as caught:
        events_of(engine)
    assert caught.value.retry_after_seconds == 7
    assert [each.asked for each in engines] == [1, 1, 1]


def test_three_failures_open_the_breaker_and_one_success_closes_it(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(replica_module, "time", SimpleNamespace(monotonic=lambda: now[0]))
    breaker = Breaker()
    for expected in (True, True, False):
        breaker.fail()
        assert breaker.closed() is expected
    now[0] += 10
    assert breaker.closed()
    breaker.begin()
    assert not breaker.closed(), "a second request went along with the trial"
    breaker.fail()
    now[0] += 9
    assert not breaker.closed()
    now[0] += 1
    breaker.begin()
    breaker.succeed()
    assert breaker.closed()


def test_a_server_that_fails_is_left_alone_and_all_of_them_are_said_to_be():
    bad = Scripted(EngineStoppedError("stopping"))
    with replicated(bad) as (engine, replicas):
        for _ in range(3):
            with pytest.raises(EngineStoppedError):
                events_of(engine)
        with pytest.raises(NotReadyError, match="no server of this model answers now"):
            events_of(engine)
        assert not engine.health().ready
        assert bad.asked == 3
        assert replicas[0].outstanding == 0


def test_the_less_busy_of_two_and_one_place_for_a_conversation():
    engines = [Scripted() for _ in range(4)]
    with replicated(*engines) as (engine, replicas):
        replicas[0].outstanding = 50
        for number in range(40):
            events_of(engine, request(f"question {number}"))
        assert engines[0].asked == 0
        replicas[0].outstanding = 0
        for each in engines:
            each.asked = 0
        for number in range(10):
            events_of(engine, request(f"question {number}", "red"))
        assert sorted(each.asked for each in engines) == [0, 0, 0, 10]
        usual = next(index for index, each in enumerate(engines) if each.asked)
        replicas[usual].outstanding = 20
        events_of(engine, request("another", "red"))
        assert engines[usual].asked == 10, "a busy server got the conversation all the same"


def test_the_watching_thread_ends_with_the_engine():
    with replicated(Scripted()):
        pass
    wait_for(lambda: not [thread for thread in threading.enumerate() if thread.name == "replicas"])
