"""An engine that is an OpenAI-compatible server: one of our own, or vLLM."""

from __future__ import annotations

import asyncio
import contextlib
import time
import weakref
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import Any

from shellv_core.config import fingerprint
from shellv_core.endpoint.client import EndpointClient, EndpointError
from shellv_core.serving.engine import (
    AdapterInfo,
    EngineHealth,
    EngineStats,
    EngineStoppedError,
    GenerationError,
    GenerationRequest,
    Message,
    TokenEvent,
)
from shellv_core.serving.gateway.wire import DIALECTS, PLAIN, AnswerReader, engine_error, message_body, request_body

READ_SECONDS = 75.0
"""The longest silence within an answer: more than the API's own limit for the first token, which ends it before."""
POLL_SECONDS = 0.05
STOPPING = "the server is shutting down; send the request again in a moment."


@dataclass(frozen=True)
class RemoteModel:
    """A model as a server's list shows it.

    Attributes:
        name: its id there.
        revision: SHA-256 that the server gives, or else one over its address and the name of its weights.
        context_length: tokens; 0 where the server does not tell.
        adapters: models that name this one as their parent.
        owner: the server's ``owned_by``, which tells what it understands.
    """

    name: str
    revision: str
    context_length: int
    adapters: tuple[AdapterInfo, ...]
    owner: str


async def describe(client: EndpointClient, name: str | None) -> RemoteModel:
    """The model `name`, or the only one without a parent, that the server lists.

    Raises:
        EndpointError: if the server does not answer, or lists no such model.
    """
    listed = (await client.ask("GET", f"{client.api_url}/models")).get("data")
    cards = [card for card in listed if isinstance(card, dict) and "id" in card] if isinstance(listed, list) else []
    bases = [card for card in cards if not card.get("parent")]
    found = [card for card in cards if card["id"] == name] if name else bases
    if len(found) != 1:
        names = ", ".join(str(card["id"]) for card in bases) or "none"
        problem = f"does not serve {name!r}" if name else "serves several models; name one"
        raise EndpointError(f"{client.url} {problem}; its models: {names}.", 404)
    card = found[0]
    adapters = [each for each in cards if each.get("parent") == card["id"]]
    return RemoteModel(
        str(card["id"]),
        _revision(client, card),
        int(card.get("context_length") or card.get("max_model_len") or 0),
        tuple(AdapterInfo(str(each["id"]), _revision(client, each)) for each in adapters),
        str(card.get("owned_by", "")),
    )


def _revision(client: EndpointClient, card: dict[str, Any]) -> str:
    return str(card.get("revision") or fingerprint(client.url, str(card.get("root") or card["id"])))


class RemoteEngine:
    """Answers with a model of a server.

    Args:
        url: the server's address, as `EndpointClient` takes it.
        model: what `describe` found there.
        api_key: that it asks for; empty for none.
    """

    def __init__(self, url: str, model: RemoteModel, api_key: str = "") -> None:
        self.model, self.context_length = model, model.context_length
        self._url, self._api_key = url, api_key
        self._dialect = DIALECTS.get(model.owner, PLAIN)
        # Connections belong to an event loop.
        self._clients: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, EndpointClient] = (
            weakref.WeakKeyDictionary()
        )
        self._reading: set[tuple[asyncio.AbstractEventLoop, asyncio.Timeout]] = set()
        self._running = self._finished = self._failed = self._cancelled = 0
        self._draining = self._aborted = False

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """See `Engine.generate`."""
        if self._draining:
            raise EngineStoppedError(STOPPING)
        self._running += 1
        try:
            # Pictures take a while to encode.
            path, body = await asyncio.to_thread(
                request_body, request, request.adapter or self.model.name, self._dialect
            )
            reader = AnswerReader()
            async with contextlib.aclosing((await self._client()).chunks(path, body)) as chunks:
                while (chunk := await self._next(chunks)) is not None:
                    for event in reader.events(chunk):
                        yield event
            last = reader.last()
            self._finished += 1
            yield last
        except EndpointError as error:
            fault = engine_error(error)
            self._failed += isinstance(fault, GenerationError | EngineStoppedError)
            raise fault from None
        except (GeneratorExit, asyncio.CancelledError):
            self._cancelled += 1
            raise
        finally:
            self._running -= 1

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        """See `Engine.count_tokens`."""
        client = await self._client()

        def body() -> dict[str, Any]:
            if messages[0].role == "text":
                return {"model": self.model.name, "prompt": message_body(messages[0])["content"]}
            return {"model": self.model.name, "messages": [message_body(each) for each in messages]}

        try:
            counted = await client.ask("POST", f"{client.url}/tokenize", json=await asyncio.to_thread(body))
            return int(counted["count"])
        except EndpointError as error:
            raise engine_error(error) from None

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """See `Engine.adapters`."""
        return self.model.adapters

    def health(self) -> EngineHealth:
        """See `Engine.health`; whether the server is there, is for who polls it to know."""
        return EngineHealth(True, not self._draining, "shutting down" if self._draining else "")

    def stats(self) -> EngineStats:
        """See `Engine.stats`; of the requests that went through here."""
        return EngineStats(
            running=self._running,
            waiting=0,
            finished=self._finished,
            failed=self._failed,
            cancelled=self._cancelled,
        )

    async def drain(self, deadline_seconds: float) -> None:
        """See `Engine.drain`; the server itself goes on."""
        self._draining = True
        deadline = time.monotonic() + deadline_seconds
        while self._running and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        self._aborted = True
        for loop, scope in tuple(self._reading):
            loop.call_soon_threadsafe(_expire, scope)
        while self._running and time.monotonic() < deadline + 1:
            await asyncio.sleep(POLL_SECONDS)
        for loop, client in tuple(self._clients.items()):
            if loop.is_running():
                asyncio.run_coroutine_threadsafe(client.close(), loop)

    async def _next(self, chunks: AsyncGenerator[dict[str, Any], None]) -> dict[str, Any] | None:
        """The next chunk, None at the end; ends when a drain's deadline has passed."""
        loop = asyncio.get_running_loop()
        try:
            async with asyncio.timeout(0 if self._aborted else None) as scope:
                self._reading.add((loop, scope))
                try:
                    return await anext(chunks, None)
                finally:
                    self._reading.discard((loop, scope))
        except TimeoutError:
            raise EngineStoppedError("the server stopped before the answer's end.") from None

    async def _client(self) -> EndpointClient:
        loop = asyncio.get_running_loop()
        client = self._clients.get(loop)
        if client is None:
            client = self._clients[loop] = EndpointClient(self._url, self._api_key, READ_SECONDS)
            await client.open()
        return client


def _expire(scope: asyncio.Timeout) -> None:
    # It may have been left between the call and now.
    with contextlib.suppress(RuntimeError):
        scope.reschedule(0)
