"""Sends requests and notes when their tokens come: closed loop and open loop."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from shellv_core.serving.bench.workload import Wanted

if TYPE_CHECKING:
    import httpx

OK, BROKEN, UNREACHED, SILENT = "200", "broken stream", "no connection", "timeout"
CONNECT_TIMEOUT_SECONDS = 10.0
LAG_SECONDS = 0.02


@dataclass
class Answer:
    """One request; moments are seconds of `time.perf_counter`.

    Attributes:
        due: when it was to be sent; all durations count from here, so that a client that falls behind hides nothing.
        sent: when it was.
        pieces: when each piece of text came.
        ended: when it was over.
        tokens: of the answer, by the server's count.
        status: ``200`` for a whole answer, another HTTP status, or a word for what went wrong.
    """

    due: float
    sent: float = 0.0
    pieces: list[float] = field(default_factory=list)
    ended: float = 0.0
    tokens: int = 0
    status: str = SILENT
    message: str = ""


@dataclass
class Load:
    """One round on one server.

    Attributes:
        seconds: from the first request's due time to the last answer's end.
        cpu_seconds: that this client's process computed.
        lags: how late the client's event loop was, in seconds; what a token may seem to come late by.
    """

    answers: list[Answer]
    seconds: float
    cpu_seconds: float
    lags: list[float]


class LoadClient:
    """A server under load; an async context manager that keeps its connections.

    Args:
        url: of the server, or of its API (``https://HOST/v1``).
        api_key: sent as a bearer token; empty for none.
        timeout_seconds: the longest silence within an answer.
    """

    def __init__(self, url: str, api_key: str, timeout_seconds: float) -> None:
        url = url.rstrip("/")
        self.url = url
        self._api_url = url if urlsplit(url).path else f"{url}/v1"
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._timeout_seconds = timeout_seconds
        self._http: httpx.AsyncClient

    async def __aenter__(self) -> LoadClient:
        import httpx

        host = urlsplit(self.url).hostname or ""
        self._http = httpx.AsyncClient(
            headers=self._headers,
            timeout=httpx.Timeout(self._timeout_seconds, connect=CONNECT_TIMEOUT_SECONDS),
            limits=httpx.Limits(max_connections=None),
            # A proxy from the environment cannot reach this machine's own addresses.
            trust_env=host not in ("localhost", "::1") and not host.startswith("127."),
        )
        return self

    async def __aexit__(self, *error: Any) -> None:
        await self._http.aclose()

    async def ask(self, wanted: Wanted, due: float | None = None) -> Answer:
        """Send one request and read its stream to the end."""
        import httpx

        now = time.perf_counter()
        answer = Answer(due=now if due is None else due, sent=now)
        try:
            async with self._http.stream("POST", f"{self._api_url}/chat/completions", json=wanted.body) as response:
                answer.status = str(response.status_code)
                if response.status_code != 200:
                    answer.message = (await response.aread()).decode("utf-8", "replace")[:500]
                elif not await _read(response, answer):
                    answer.status = BROKEN
        except httpx.TimeoutException:
            answer.status = SILENT
        except httpx.ConnectError as error:
            answer.status, answer.message = UNREACHED, str(error)
        except httpx.HTTPError as error:
            answer.status, answer.message = BROKEN, str(error)
        answer.ended = time.perf_counter()
        return answer


async def closed_loop(client: LoadClient, requests: Sequence[Wanted], clients: int, done: Callable[[], object]) -> Load:
    """`clients` that each send their next request when the one before is answered."""
    left = iter(requests)

    async def one(answers: list[Answer]) -> None:
        for wanted in left:
            answers.append(await client.ask(wanted))
            done()

    return await _timed(lambda answers: [one(answers) for _ in range(min(clients, len(requests)))])


async def open_loop(
    client: LoadClient, requests: Sequence[Wanted], rate: float, seed: int, done: Callable[[], object]
) -> Load:
    """Requests that come on their own, `rate` a second on average at random moments (Poisson), whatever is answered."""
    moments = arrivals(rate, seed)
    begun = time.perf_counter()

    async def one(wanted: Wanted, due: float, answers: list[Answer]) -> None:
        await asyncio.sleep(max(due - time.perf_counter(), 0))
        answers.append(await client.ask(wanted, due))
        done()

    return await _timed(lambda answers: [one(wanted, begun + next(moments), answers) for wanted in requests])


def arrivals(rate: float, seed: int) -> Iterator[float]:
    """Seconds at which requests come: exponential gaps of ``1 / rate`` on average."""
    rng, moment = Random(f"{seed}/arrivals"), 0.0
    while True:
        moment += rng.expovariate(rate)
        yield moment


async def _timed(works: Callable[[list[Answer]], list[Any]]) -> Load:
    answers: list[Answer] = []
    lags: list[float] = []
    watch = asyncio.create_task(_watch(lags))
    cpu = time.process_time()
    try:
        await asyncio.gather(*works(answers))
    finally:
        cpu = time.process_time() - cpu
        watch.cancel()
    answers.sort(key=lambda each: each.due)
    return Load(answers, max(each.ended for each in answers) - answers[0].due, cpu, lags)


async def _watch(lags: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(LAG_SECONDS)
        lags.append(time.perf_counter() - before - LAG_SECONDS)


async def _read(response: httpx.Response, answer: Answer) -> bool:
    """Take in a stream of events; whether it was whole."""
    import orjson

    rest, finished = b"", False
    async for data in response.aiter_bytes():
        now = time.perf_counter()
        *events, rest = (rest + data).split(b"\n\n")
        for event in events:
            if not event.startswith(b"data:"):
                continue
            content = event[5:].strip()
            if content == b"[DONE]":
                return finished
            try:
                chunk = orjson.loads(content)
            except orjson.JSONDecodeError:
                answer.message = content.decode("utf-8", "replace")[:500]
                return False
            if "error" in chunk:
                answer.message = str(chunk["error"])[:500]
                return False
            if usage := chunk.get("usage"):
                answer.tokens = usage.get("completion_tokens", 0)
            for choice in chunk.get("choices", ()):
                if choice["delta"].get("content"):
                    answer.pieces.append(now)
                finished |= choice.get("finish_reason") is not None
    return False
