"""A request on its way through the engine, and what every way of running requests has in common."""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Protocol

from shellv_core.errors import ShellVError
from shellv_core.serving.engine import TokenEvent
from shellv_core.serving.inference.answer import Task

NOT_FINITE = "the model returned numbers that are not finite; its weights may be damaged."
FAULT = "the model failed on this request; the server's log says why."
OUT_OF_MEMORY = "the model ran out of memory; shorten the messages or send fewer pictures."

#: An event of an answer, the error that it ends with, or None for one that was cancelled.
Outcome = TokenEvent | ShellVError | None


@dataclass(eq=False)
class Job:
    """A request between the event loop, which reads `events`, and the engine's thread, which fills it."""

    task: Task
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TokenEvent | ShellVError] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    submitted: float = field(default_factory=time.monotonic)
    started: float = 0.0


@dataclass(eq=False)
class Errand:
    """Something else that the engine's thread does between two steps; `future` brings its result."""

    work: Callable[[], Any]
    future: Future[Any] = field(default_factory=Future)

    def run(self) -> None:
        """Do it, unless nobody waits any more."""
        if not self.future.set_running_or_notify_cancel():
            return
        try:
            self.future.set_result(self.work())
        except Exception as error:  # noqa: BLE001  raised where it is waited for
            self.future.set_exception(error)


@dataclass(frozen=True)
class Delivery:
    """Something that happened to a job; it is the last thing unless it is an event without a finish reason."""

    job: Job
    outcome: Outcome

    @property
    def last(self) -> bool:
        """Whether the job is over."""
        return not isinstance(self.outcome, TokenEvent) or self.outcome.finish_reason is not None


def post(deliveries: Iterable[Delivery]) -> None:
    """Hand outcomes to the event loops that wait for them, each woken once."""
    by_loop: dict[asyncio.AbstractEventLoop, list[tuple[Job, TokenEvent | ShellVError]]] = {}
    for delivery in deliveries:
        if delivery.outcome is not None:
            by_loop.setdefault(delivery.job.loop, []).append((delivery.job, delivery.outcome))
    for loop, group in by_loop.items():
        # The loop may be closed already when the process is on its way out.
        if not loop.is_closed():
            loop.call_soon_threadsafe(_put, group)


def _put(group: list[tuple[Job, TokenEvent | ShellVError]]) -> None:
    for job, outcome in group:
        job.events.put_nowait(outcome)


@dataclass
class Counters:
    """What a runner counts; names as in `EngineStats`."""

    kv_tokens: int = 0
    kv_capacity: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    completion_tokens: int = 0
    image_hits: int = 0
    image_misses: int = 0
    nonfinite: int = 0
    out_of_memory: int = 0
    #: Requests that ended for want of finite logits since the last one that did not.
    nonfinite_in_a_row: int = 0


class Runner(Protocol):
    """A way of running requests; used by the engine's thread alone, within ``torch.inference_mode``."""

    slots: int

    @property
    def jobs(self) -> list[Job]:
        """The requests that run."""
        ...

    def step(self, waiting: deque[Job]) -> list[Delivery]:
        """Take requests from `waiting` while there is room, and bring those that run one step further.

        A request's fault is a delivery; only what breaks the runner itself is raised.
        """
        ...
