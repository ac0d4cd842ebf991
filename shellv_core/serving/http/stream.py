"""Server-sent events: a stream that pings while it is silent, and ends its source when the client goes."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator
from typing import TYPE_CHECKING, Any

import orjson
from starlette.responses import Response

from shellv_core.errors import ServingError
from shellv_core.logs import get_logger
from shellv_core.serving.http.answers import disconnection
from shellv_core.serving.http.errors import describe, error_body

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send

logger = get_logger(__name__)

DONE = b"data: [DONE]\n\n"
PING = b": ping\n\n"


def event(content: dict[str, Any]) -> bytes:
    """One event that carries `content`."""
    return b"data: " + orjson.dumps(content) + b"\n\n"


class EventStream(Response):
    """Sends `events` and then ``[DONE]``; a failure on the way becomes an event with OpenAI's error body.

    Args:
        events: the stream's content, closed when the client goes, wherever it stands then.
        headers: of the response.
        ping_seconds: silence after which a comment is sent.
        lease: held until the stream has ended.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncGenerator[bytes, None],
        headers: dict[str, str],
        ping_seconds: float,
        lease: contextlib.AsyncExitStack,
    ) -> None:
        super().__init__(headers={"cache-control": "no-store", "x-accel-buffering": "no", **headers})
        del self.headers["content-length"]
        self._events, self._ping_seconds, self._lease = events, ping_seconds, lease
        self._sent = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one ASGI request."""
        async with self._lease, contextlib.aclosing(self._events):
            await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
            self._sent = time.monotonic()
            pump = asyncio.ensure_future(self._pump(send))
            others = [asyncio.ensure_future(self._ping(send)), asyncio.ensure_future(disconnection(receive))]
            try:
                await asyncio.wait([pump, others[1]], return_when=asyncio.FIRST_COMPLETED)
            finally:
                for each in (pump, *others):
                    each.cancel()
                await asyncio.gather(pump, *others, return_exceptions=True)
        if not pump.cancelled():
            pump.result()
            await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _pump(self, send: Send) -> None:
        try:
            async for each in self._events:
                await self._send(send, each)
        except ServingError as error:
            await self._send(send, event(describe(error)[1]))
        except Exception:
            logger.exception("a stream failed")
            await self._send(send, event(error_body("the server failed on this request.", "server_error")))
        await self._send(send, DONE)

    async def _ping(self, send: Send) -> None:
        while True:
            await asyncio.sleep(max(self._sent + self._ping_seconds - time.monotonic(), 0.01))
            if time.monotonic() - self._sent >= self._ping_seconds:
                await self._send(send, PING)

    async def _send(self, send: Send, content: bytes) -> None:
        await send({"type": "http.response.body", "body": content, "more_body": True})
        self._sent = time.monotonic()
