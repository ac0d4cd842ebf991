"""One request's answers on their way from the engine: begun, timed, merged, and closed when the client leaves."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, Awaitable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypeVar

from fastapi import Request

from shellv_core.serving.engine import FinishReason, GenerationRequest, TokenEvent, TokenLogprob
from shellv_core.serving.http.config import Timeouts
from shellv_core.serving.http.errors import AnswerTimeoutError, ClientGoneError
from shellv_core.serving.http.metrics import Metrics
from shellv_core.serving.models import ServedModel

if TYPE_CHECKING:
    from starlette.types import Receive

T = TypeVar("T")
Events = AsyncGenerator[TokenEvent, None]


@dataclass
class Collected:
    """What has come of one answer."""

    texts: list[str] = field(default_factory=list)
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[TokenLogprob] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    completion_tokens: int = 0

    def add(self, event: TokenEvent) -> None:
        """Take in one step."""
        self.texts.append(event.text)
        self.token_ids += event.token_ids
        self.logprobs += event.logprobs
        self.finish_reason, self.completion_tokens = event.finish_reason, event.completion_tokens


class Answers:
    """The answers to one request, each a generation of its own.

    Args:
        model: who answers.
        request: what is asked; answers after the first have seeds of their own.
        count: how many answers.
        timeouts: how long they may take.
        metrics: where their steps are timed.
        arrived: when the request came, by `time.monotonic`.
    """

    def __init__(
        self,
        model: ServedModel,
        request: GenerationRequest,
        count: int,
        timeouts: Timeouts,
        metrics: Metrics,
        arrived: float,
    ) -> None:
        requests = [request] + [
            request if request.seed is None else replace(request, seed=_later_seed(request.seed, index))
            for index in range(1, count)
        ]
        self.prompt_tokens = self.completion_tokens = 0
        self._events: list[Events] = [model.engine.generate(each) for each in requests]
        self._clocks = [metrics.answer(model.name, arrived) for _ in requests]
        self._timeouts, self._arrived = timeouts, arrived

    async def begin(self) -> None:
        """Return when the model has taken the request, so that a refusal still has an HTTP status.

        Raises:
            ServingError: if it is refused, or its turn does not come in time.
        """
        firsts = await self._in_time(
            _all_or_none([anext(events) for events in self._events]), self._timeouts.first_token_seconds
        )
        self.prompt_tokens = firsts[0].prompt_tokens
        for clock, event in zip(self._clocks, firsts, strict=True):
            clock.observe(event)

    async def steps(self) -> AsyncGenerator[tuple[int, TokenEvent], None]:
        """Every step of every answer, with the answer's index, as they come.

        Raises:
            ServingError: if the model fails, or takes too long.
        """
        if len(self._events) == 1:
            async with aclosing(self._answer(0)) as only:
                async for event in only:
                    yield 0, event
            return
        merged: asyncio.Queue[tuple[int, TokenEvent] | BaseException | None] = asyncio.Queue()

        async def pump(index: int) -> None:
            async for event in self._answer(index):
                merged.put_nowait((index, event))

        async def pump_all() -> None:
            try:
                await _all_or_none([pump(index) for index in range(len(self._events))])
                merged.put_nowait(None)
            except Exception as error:  # noqa: BLE001  raised where the steps are read
                merged.put_nowait(error)

        pumping = asyncio.ensure_future(pump_all())
        try:
            while (step := await merged.get()) is not None:
                if isinstance(step, BaseException):
                    raise step
                yield step
        finally:
            pumping.cancel()
            await asyncio.gather(pumping, return_exceptions=True)

    async def collect(self) -> list[Collected]:
        """All answers whole.

        Raises:
            as `steps`.
        """
        collected = [Collected() for _ in self._events]
        async with aclosing(self.steps()) as steps:
            async for index, event in steps:
                collected[index].add(event)
        return collected

    async def aclose(self) -> None:
        """Leave the model; what has not come is not computed."""
        for events in self._events:
            await events.aclose()

    async def _answer(self, index: int) -> AsyncGenerator[TokenEvent, None]:
        """The steps after the first of one answer, in time."""
        events, clock = self._events[index], self._clocks[index]
        limit = self._arrived + self._timeouts.first_token_seconds - time.monotonic()
        while True:
            event = await self._in_time(anext(events), limit)
            clock.observe(event)
            yield event
            if event.finish_reason is not None:
                self.completion_tokens += event.completion_tokens
                self.prompt_tokens = event.prompt_tokens  # some engines learn of it only now
                return
            limit = self._timeouts.idle_seconds

    async def _in_time(self, work: Awaitable[T], seconds: float) -> T:
        left = self._arrived + self._timeouts.request_seconds - time.monotonic()
        try:
            async with asyncio.timeout(max(min(seconds, left), 0)):
                return await work
        except TimeoutError:
            if seconds < left:
                raise AnswerTimeoutError(f"no token came for {max(seconds, 0):.0f} seconds; try again.") from None
            raise AnswerTimeoutError(
                f"the answer took longer than {self._timeouts.request_seconds:g} seconds; ask for fewer tokens."
            ) from None


def _later_seed(seed: int, index: int) -> int:
    """A seed for a further answer, in the range of 64 bits with sign."""
    return (seed + index + 2**63) % 2**64 - 2**63


async def _all_or_none(works: Sequence[Awaitable[T]]) -> list[T]:
    """Every result; the first failure ends the others and is raised."""
    if len(works) == 1:
        return [await works[0]]
    tasks = [asyncio.ensure_future(work) for work in works]
    try:
        return list(await asyncio.gather(*tasks))
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes first.

    Raises:
        ClientGoneError: if it did.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(disconnection(request.receive))
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def disconnection(receive: Receive) -> None:
    """Return when the client has closed the connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
