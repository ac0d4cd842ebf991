"""Ten times as many requests as the server can answer: it answers what it can as fast as ever, and refuses the rest."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

import pytest

from shellv_core.serving.local_server import local_server
from tests.serving.tiny_model import build_model

OVERLOAD = 10


class Client:
    """Asks over connections that it keeps, at next to no cost: one that competes with the server for the processor
    measures itself."""

    def __init__(self, url: str) -> None:
        self._address = urlsplit(url)
        self._idle: list[tuple[float, asyncio.StreamReader, asyncio.StreamWriter]] = []

    async def ask(self, request: bytes) -> tuple[int, dict[str, str]]:
        """Status and headers of the answer, of which nothing else is looked at."""
        reader, writer = await self._connection()
        writer.write(request)
        head = (await reader.readuntil(b"\r\n\r\n")).decode().splitlines()
        headers = dict(line.lower().split(": ", 1) for line in head[1:] if line)
        await reader.readexactly(int(headers["content-length"]))
        if headers.get("connection") == "close":
            writer.close()
        else:
            self._idle.append((time.monotonic(), reader, writer))
        return int(head[0].split()[1]), headers

    async def _connection(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        while self._idle:
            since, reader, writer = self._idle.pop()
            if time.monotonic() - since < 1:  # long before the server closes it
                return reader, writer
            writer.close()
        return await asyncio.open_connection(self._address.hostname, self._address.port)


def get(path: str) -> bytes:
    return f"GET {path} HTTP/1.1\r\nhost: server\r\n\r\n".encode()


def question(max_tokens: int) -> bytes:
    messages = [{"role": "user", "content": "hello"}]
    # Answers of one length, so that seconds of different phases compare.
    body = json.dumps({"messages": messages, "max_tokens": max_tokens, "min_tokens": max_tokens}).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nhost: server\r\ncontent-type: application/json\r\n"
    return f"{head}content-length: {len(body)}\r\n\r\n".encode() + body


@dataclass
class Outcome:
    """Statuses, seconds of the answers, and refusals that do not say when to come back."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    silent: int = 0

    @property
    def p95(self) -> float:
        return sorted(self.seconds)[int(0.95 * len(self.seconds))]


async def ask(client: Client, max_tokens: int, outcome: Outcome) -> None:
    started = time.monotonic()
    status, headers = await client.ask(question(max_tokens))
    outcome.statuses[status] += 1
    if status == 200:
        outcome.seconds.append(time.monotonic() - started)
    elif not 1 <= int(headers.get("retry-after", 0)) <= 60:
        outcome.silent += 1


async def at_capacity(client: Client, clients: int, count: int, max_tokens: int) -> tuple[Outcome, float]:
    """As many clients as there are places, each with one request at a time; what they saw, and requests a second."""
    outcome, started = Outcome(), time.monotonic()
    left = iter(range(count))

    async def loop() -> None:
        for _ in left:
            await ask(client, max_tokens, outcome)

    await asyncio.gather(*(loop() for _ in range(clients)))
    return outcome, count / (time.monotonic() - started)


async def overloaded(client: Client, rate: float, seconds: float, max_tokens: int) -> Outcome:
    """Requests that come at `rate` a second whatever becomes of them, at random times."""
    outcome, rng = Outcome(), random.Random(0)
    at, end = time.monotonic(), time.monotonic() + seconds
    async with asyncio.TaskGroup() as tasks:
        while at < end:
            at += rng.expovariate(rate)
            await asyncio.sleep(max(at - time.monotonic(), 0))
            tasks.create_task(ask(client, max_tokens, outcome))
    return outcome


async def measure(server: Any, count: int, seconds: float, max_tokens: int) -> tuple[Outcome, Outcome, float]:
    client = Client(server.url)
    places = 16 + 4 * 16  # that are answered, and that wait
    await at_capacity(client, places, places, max_tokens)
    full, rate = await at_capacity(client, places, count, max_tokens)
    over = await overloaded(client, OVERLOAD * rate, seconds, max_tokens)
    deadline = time.monotonic() + 60
    while (await client.ask(get("/readyz")))[0] != 200:
        assert time.monotonic() < deadline
    return full, over, rate


@pytest.mark.parametrize(
    ("width", "count", "seconds", "max_tokens"),
    [
        pytest.param(32, 100, 3.0, 60),
        # Wide enough that the model's steps are the work: of a smaller one refusals alone take a third of the time.
        pytest.param(768, 240, 120.0, 100, marks=[pytest.mark.fuzz, pytest.mark.timeout(1800)]),
    ],
)
def test_overload(processor, tmp_path, width, count, seconds, max_tokens):
    build_model(processor, width=width).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    with local_server(str(tmp_path / "model"), "127.0.0.1", 0, tmp_path / "serve.log", 250) as server:
        full, over, rate = asyncio.run(measure(server, count, seconds, max_tokens))
    print(
        f"capacity {rate:.1f} requests a second, p95 {full.p95:.2f} s; offered {OVERLOAD * rate:.0f} a second for"
        f" {seconds:.0f} s: {dict(over.statuses)}, p95 of the accepted {over.p95:.2f} s"
    )
    assert set(full.statuses) == {200}
    assert set(over.statuses) == {200, 429}
    assert over.silent == 0
    if seconds > 60:  # a time of a few seconds' run says nothing
        assert over.p95 <= 1.5 * full.p95
    assert "Traceback" not in (tmp_path / "serve.log").read_text()
