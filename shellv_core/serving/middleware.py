"""What holds for every HTTP request: an id, a bounded body, a log line without content.

Plain ASGI, since Starlette's `BaseHTTPMiddleware` hides a client's disconnect from the handlers.
"""

from __future__ import annotations

import asyncio
import json
import re
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shellv_core.logs import get_logger
from shellv_core.serving.schema import error_body

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

logger = get_logger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
LINGER_SECONDS = 5.0


@dataclass
class InFlight:
    """A count of requests that are being answered."""

    count: int = 0


class RequestTrace:
    """Gives every request an id (the client's own ``x-request-id`` where it is well-formed), returns it as a header,
    and logs and counts the requests below `api_prefix`."""

    def __init__(self, app: ASGIApp, api_prefix: str, in_flight: InFlight) -> None:
        self.app, self.api_prefix, self.in_flight = app, api_prefix, in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        asked = dict(scope["headers"]).get(b"x-request-id", b"").decode("latin-1")
        request_id = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", request_id.encode())]
            await send(message)

        is_api = scope["path"].startswith(self.api_prefix)
        started = time.monotonic()
        self.in_flight.count += is_api
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self.in_flight.count -= is_api
            if is_api:
                elapsed = time.monotonic() - started
                logger.info("%s %s %s %d %.2f s", request_id, scope["method"], scope["path"], status, elapsed)


class BodyLimit:
    """Reads the whole body before the application sees the request, and refuses one that is too large or too slow.

    The length is counted as it arrives; what Content-Length states is only a reason to refuse early.
    """

    def __init__(self, app: ASGIApp, max_bytes: int, timeout_seconds: float) -> None:
        self.app, self.max_bytes, self.timeout_seconds = app, max_bytes, timeout_seconds

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        stated = dict(scope["headers"]).get(b"content-length", b"0")
        too_large = stated.isdigit() and int(stated) > self.max_bytes
        body = None
        try:
            async with asyncio.timeout(self.timeout_seconds):
                body = None if too_large else await self._read(receive)
        except TimeoutError:
            message = f"the request's body did not arrive within {self.timeout_seconds:g} seconds."
            await _refuse(send, 408, message, "request_timeout")
            return
        except ConnectionResetError:
            return
        if body is None:
            await self._linger(receive)
            message = f"the request's body is too large; {self.max_bytes} bytes are allowed."
            await _refuse(send, 413, message, "body_too_large")
            return

        pending: Message | None = {"type": "http.request", "body": body, "more_body": False}

        async def replay() -> Message:
            nonlocal pending
            if pending is None:
                return await receive()
            message, pending = pending, None
            return message

        await self.app(scope, replay, send)

    async def _read(self, receive: Receive) -> bytes | None:
        """The body, or None as soon as it exceeds the limit."""
        chunks: list[bytes] = []
        size = 0
        while True:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError
            chunks.append(message.get("body", b""))
            size += len(chunks[-1])
            if size > self.max_bytes:
                return None
            if not message.get("more_body"):
                return b"".join(chunks)

    async def _linger(self, receive: Receive) -> None:
        """Throw away what is still on its way, for a while: a connection closed at once would be reset, and the
        client would never read why."""
        thrown_away = 0
        try:
            async with asyncio.timeout(LINGER_SECONDS):
                while thrown_away <= 2 * self.max_bytes:
                    message = await receive()
                    thrown_away += len(message.get("body", b""))
                    if not message.get("more_body"):
                        return
        except TimeoutError:
            return


async def _refuse(send: Send, status: int, message: str, code: str) -> None:
    body = json.dumps(error_body(message, "invalid_request_error", code=code)).encode()
    headers = [
        (b"content-type", b"application/json"),
        (b"content-length", str(len(body)).encode()),
        (b"connection", b"close"),
    ]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body})
