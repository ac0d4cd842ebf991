"""Ten times as many requests as the server can answer: it answers what it can as fast as ever, and refuses the rest."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import pytest

from shellv_core.serving.local_server import local_server

OVERLOAD = 10


@dataclass
class Outcome:
    """Statuses, seconds of the answers, and refusals that do not say when to come back."""

    statuses: Counter[int] = field(default_factory=Counter)
    seconds: list[float] = field(default_factory=list)
    silent: int = 0

    @property
    def p95(self) -> float:
        return sorted(self.seconds)[int(0.95 * len(self.seconds))]


async def ask(client: httpx.AsyncClient, max_tokens: int, outcome: Outcome) -> None:
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": max_tokens}
    started = time.monotonic()
    response = await client.post("/v1/chat/completions", json=body)
    outcome.statuses[response.status_code] += 1
    if response.status_code == 200:
        outcome.seconds.append(time.monotonic() - started)
    elif not 1 <= int(response.headers.get("retry-after", 0)) <= 60:
        outcome.silent += 1


async def at_capacity(client: httpx.AsyncClient, clients: int, count: int, max_tokens: int) -> tuple[Outcome, float]:
    """As many clients as there are places, each with one request at a time; what they saw, and requests a second."""
    outcome, started = Outcome(), time.monotonic()
    left = iter(range(count))

    async def loop() -> None:
        for _ in left:
            await ask(client, max_tokens, outcome)

    await asyncio.gather(*(loop() for _ in range(clients)))
    return outcome, count / (time.monotonic() - started)


async def overloaded(client: httpx.AsyncClient, rate: float, seconds: float, max_tokens: int) -> Outcome:
    """Requests that come at `rate` a second whatever becomes of them, at random times."""
    outcome, rng, tasks = Outcome(), random.Random(0), set()
    at, end = time.monotonic(), time.monotonic() + seconds
    while at < end:
        at += rng.expovariate(rate)
        await asyncio.sleep(max(at - time.monotonic(), 0))
        task = asyncio.create_task(ask(client, max_tokens, outcome))
        tasks.add(task)
        task.add_done_callback(tasks.discard)
    await asyncio.gather(*tasks)
    return outcome


async def measure(server: Any, count: int, seconds: float, max_tokens: int) -> tuple[Outcome, Outcome, float]:
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=256)
    async with httpx.AsyncClient(base_url=server.url, timeout=300, limits=limits) as client:
        places = 16 + 4 * 16  # that are answered, and that wait
        await at_capacity(client, places, places, max_tokens)
        full, rate = await at_capacity(client, places, count, max_tokens)
        over = await overloaded(client, OVERLOAD * rate, seconds, max_tokens)
        deadline = time.monotonic() + 60
        while (await client.get("/readyz")).status_code != 200:
            assert time.monotonic() < deadline
    return full, over, rate


@pytest.mark.parametrize(
    ("count", "seconds", "max_tokens"),
    [
        pytest.param(100, 3.0, 60),
        pytest.param(400, 120.0, 300, marks=[pytest.mark.fuzz, pytest.mark.timeout(1800)]),
    ],
)
def test_overload(model_path, tmp_path, count, seconds, max_tokens):
    with local_server(str(model_path), "127.0.0.1", 0, tmp_path / "serve.log", 250) as server:
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
