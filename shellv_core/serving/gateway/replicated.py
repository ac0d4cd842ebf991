"""An engine of several servers of one model: each request goes to a server with room, and on to another if it fails.

Servers are asked for their load; none has to register anywhere. A request whose first token has come stays where it
is: what its client has seen cannot be taken back.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import random
import threading
import time
from collections.abc import AsyncGenerator, Callable, Sequence

from shellv_core.endpoint.client import EndpointClient
from shellv_core.errors import ServingError
from shellv_core.logs import get_logger
from shellv_core.serving.engine import (
    AdapterInfo,
    EngineHealth,
    EngineStats,
    EngineStoppedError,
    GenerationError,
    GenerationRequest,
    ImagePart,
    Message,
    NotReadyError,
    QueueFullError,
    QueueTimeoutError,
    TextPart,
    TokenEvent,
)
from shellv_core.serving.gateway.remote import STOPPING, RemoteModel
from shellv_core.serving.gateway.replica import Replica
from shellv_core.serving.gateway.wire import ConnectionLostError

logger = get_logger(__name__)

POLL_SECONDS = 2.0
FIRST_POLL_SECONDS = 0.2
ASK_SECONDS = 2.0
AFFINITY_LOAD = 0.25
"""Requests per place that a conversation's usual server may be busier by and still get it."""
MAX_LOST = 1
"""Servers that one request may have lost under it before it fails: it may be the request that brings them down."""

Replicas = Callable[[], Sequence[Replica]]


class ReplicatedEngine:
    """Answers with whichever of its servers has room.

    Args:
        replicas: the servers as of now; called before every look at them, from a thread of this engine.
    """

    def __init__(self, replicas: Replicas) -> None:
        self._source = replicas
        self._replicas: Sequence[Replica] = ()
        self._finished = self._cancelled = self._rejected = self._failed = 0
        self._prompt_tokens = self._completion_tokens = 0
        self._draining = False
        self._stopped, self._poked = threading.Event(), threading.Event()
        self._looked = threading.Event()
        threading.Thread(target=self._watch, name="replicas", daemon=True).start()

    @property
    def context_length(self) -> int:
        """Tokens of the smallest context among the servers; 0 where none tells."""
        return min((each.context_length for each in self._models() if each.context_length), default=0)

    @property
    def model(self) -> RemoteModel | None:
        """What the servers say that they serve; None until one has been reached."""
        return next(iter(self._models()), None)

    @property
    def replicas(self) -> Sequence[Replica]:
        """The servers as they were last seen."""
        return self._replicas

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """See `Engine.generate`."""
        key = await self._affinity(request)
        tried: list[Replica] = []
        error: ServingError | None = None
        begun, lost = False, 0
        while True:
            replica = self._pick(key, tried, error)
            tried.append(replica)
            first_token = False
            try:
                async with contextlib.aclosing(self._ask(replica, request)) as events:
                    async for event in events:
                        first_token |= event.completion_tokens > 0
                        # The first event, which says that the turn has come, is not said twice.
                        if not begun or event.completion_tokens or event.finish_reason:
                            begun = True
                            yield event
                return
            except (EngineStoppedError, GenerationError, QueueFullError, QueueTimeoutError) as fault:
                lost += isinstance(fault, ConnectionLostError | GenerationError)
                if first_token or lost > MAX_LOST or self._draining:
                    raise
                error = fault
                logger.info("a request moves on from %s: %s", replica.url, fault)

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        """See `Engine.count_tokens`."""
        engine = self._pick("", [], None).engine
        assert engine is not None  # noqa: S101  what is picked has been reached
        return await engine.count_tokens(messages)

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """See `Engine.adapters`."""
        model = self.model
        return model.adapters if model else ()

    def health(self) -> EngineHealth:
        """See `Engine.health`; ready while one server is."""
        if self._draining:
            return EngineHealth(True, False, "shutting down")
        if any(each.ready and each.breaker.closed() for each in self._replicas):
            return EngineHealth(True, True)
        problems = dict.fromkeys(f"{each.url}: {each.problem or 'it fails'}" for each in self._replicas)
        return EngineHealth(True, False, "; ".join(problems) or "no server of this model is known")

    def stats(self) -> EngineStats:
        """See `Engine.stats`; load as the servers told it, counters of what went through here."""
        loads = [each.stats() for each in self._replicas]
        return EngineStats(
            running=sum(each.running for each in loads),
            waiting=sum(each.waiting for each in loads),
            slots=sum(each.slots for each in loads),
            finished=self._finished,
            cancelled=self._cancelled,
            rejected=self._rejected,
            failed=self._failed,
            prompt_tokens=self._prompt_tokens,
            completion_tokens=self._completion_tokens,
        )

    async def drain(self, deadline_seconds: float) -> None:
        """See `Engine.drain`."""
        self._draining = True
        engines = [each.engine for each in self._replicas if each.engine is not None]
        await asyncio.gather(*(engine.drain(deadline_seconds) for engine in engines))
        self._stopped.set()
        self._poked.set()

    def await_ready(self, seconds: float, check: Callable[[], None] = lambda: None) -> None:
        """Return when all servers take requests; from a thread that may wait.

        Args:
            check: raises if waiting makes no sense any more.

        Raises:
            ServingError: if they do not in time, with why.
        """
        deadline = time.monotonic() + seconds
        while not self._replicas or not all(each.ready for each in self._replicas):
            check()
            if time.monotonic() > deadline:
                raise ServingError(f"after {seconds:g} s not all servers are ready: {self.health().reason}")
            self._poked.set()
            self._stopped.wait(FIRST_POLL_SECONDS)

    def await_look(self, seconds: float) -> None:
        """Return when the servers have been asked once, or the time is over; from a thread that may wait."""
        self._looked.wait(seconds)

    def _models(self) -> list[RemoteModel]:
        return [each.engine.model for each in self._replicas if each.engine is not None]

    async def _ask(self, replica: Replica, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """One server's answer, counted."""
        engine = replica.engine
        assert engine is not None  # noqa: S101  what is picked has been reached
        replica.outstanding += 1
        replica.breaker.begin()
        try:
            async with contextlib.aclosing(engine.generate(request)) as events:
                async for event in events:
                    if event.finish_reason is not None:
                        replica.breaker.succeed()
                        self._finished += 1
                        self._prompt_tokens += event.prompt_tokens
                        self._completion_tokens += event.completion_tokens
                    yield event
        except (EngineStoppedError, GenerationError):
            replica.breaker.fail()
            self._failed += 1
            self._poked.set()  # so that what became of it is known soon
            raise
        except QueueFullError:
            self._rejected += 1
            replica.ready, replica.problem = False, "its queue is full"
            self._poked.set()
            raise
        except (GeneratorExit, asyncio.CancelledError):
            self._cancelled += 1
            raise
        finally:
            replica.outstanding -= 1

    def _pick(self, key: str, tried: Sequence[Replica], error: ServingError | None) -> Replica:
        """A server for the next try.

        Raises:
            ServingError: `error`, or `NotReadyError`, if there is none left.
        """
        if self._draining:
            raise EngineStoppedError(STOPPING)
        left = [each for each in self._replicas if each not in tried and each.engine and each.breaker.closed()]
        # One that says it is full, or was not reached lately, is still better than no answer at all.
        left = [each for each in left if each.ready] or left
        if not left:
            raise error or NotReadyError(f"no server of this model answers now: {self.health().reason}")
        # Of two that are drawn, the less busy one; of a conversation, always the same two.
        if key:
            left.sort(key=lambda each: hashlib.sha256(f"{key} {each.url}".encode()).digest())
        else:
            random.shuffle(left)
        first, second = left[0], left[min(1, len(left) - 1)]
        return first if first.load <= second.load + (AFFINITY_LOAD if key else 0) else second

    async def _affinity(self, request: GenerationRequest) -> str:
        """What the requests of one conversation share, whose prompt and picture one server remembers: adapter, first
        picture or, without any, first text."""
        if len(self._replicas) < 2:
            return ""
        parts = [part for message in request.messages for part in message.parts]
        picture = next((part for part in parts if isinstance(part, ImagePart)), None)
        text = next((part.text for part in parts if isinstance(part, TextPart)), "")

        def digest() -> str:
            content = text.encode() if picture is None else picture.image.tobytes()
            return hashlib.blake2b(content, key=(request.adapter or "").encode()[:64]).hexdigest()

        return await asyncio.to_thread(digest) if picture else digest()

    def _watch(self) -> None:
        asyncio.run(self._poll())

    async def _poll(self) -> None:
        clients: dict[Replica, EndpointClient] = {}
        while not self._stopped.is_set():
            self._poked.clear()
            try:
                replicas = list(await asyncio.to_thread(self._source))
                for gone in [each for each in clients if each not in replicas]:
                    await clients.pop(gone).close()
                for new in [each for each in replicas if each not in clients]:
                    clients[new] = EndpointClient(new.url, new.api_key, ASK_SECONDS)
                    await clients[new].open()
                await asyncio.gather(*(each.poll(clients[each]) for each in replicas))
                self._replicas = replicas
            except Exception:  # whatever it is, the next look may see more
                logger.exception("looking at the servers failed")
            self._looked.set()
            await asyncio.to_thread(self._poked.wait, POLL_SECONDS)
            await asyncio.sleep(FIRST_POLL_SECONDS)
        for client in clients.values():
            await client.close()
