"""The request's body, read before the application sees the request, and refused when it is too large or too slow.

uvicorn bounds neither. Plain ASGI, since Starlette's `BaseHTTPMiddleware` hides a client's disconnect from handlers.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import time
from typing import TYPE_CHECKING

from shellv_core.serving.http.config import BodyLimits
from shellv_core.serving.http.errors import RETRY_AFTER_SECONDS, error_body, refuse

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

MARKS = b",[{"
LARGE_BYTES = 256 << 10
"""A body of as many leaves memory behind that malloc would keep for later."""
TRIM_SECONDS = 5.0
"""After such a body's end, so that many of them are cleared away at once."""


class _RefusedError(Exception):
    def __init__(self, status: int, message: str, code: str, retry_after: int = 0) -> None:
        super().__init__(message)
        self.status, self.code, self.retry_after = status, code, retry_after


class BodyLimit:
    """Holds every request's body to `limits`.

    The length is counted as it arrives; what Content-Length states is only a reason to refuse early.
    """

    def __init__(self, app: ASGIApp, limits: BodyLimits) -> None:
        self.app, self.limits = app, limits
        self._in_flight = 0
        self._trim_is_due = False

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        reading = _Reading(self.limits, receive)
        try:
            try:
                pending: Message | None = await self._read(scope, reading)
            except ConnectionResetError:
                return
            except _RefusedError as refused:
                body = error_body(str(refused), "invalid_request_error", code=refused.code)
                await refuse(send, refused.status, body, refused.retry_after, close=refused.status == 408)
                return

            async def replay() -> Message:
                nonlocal pending
                if pending is None:
                    return await receive()
                message, pending = pending, None
                return message

            await self.app(scope, replay, send)
        finally:
            self._in_flight -= reading.size
            if reading.size >= LARGE_BYTES:
                self._trim_soon()

    def _trim_soon(self) -> None:
        """What large bodies took goes back to the system, once for all that end within some seconds."""

        def trim() -> None:
            self._trim_is_due = False
            loop.run_in_executor(None, _return_freed_memory)

        loop = asyncio.get_running_loop()
        if not self._trim_is_due:
            self._trim_is_due = True
            loop.call_later(TRIM_SECONDS, trim)

    async def _read(self, scope: Scope, reading: _Reading) -> Message:
        stated = dict(scope["headers"]).get(b"content-length", b"")
        if stated.isdigit() and (len(stated) > 15 or int(stated) > self.limits.max_bytes):
            raise _too_large(self.limits)
        chunks: list[bytes] = []
        async for chunk in reading:
            self._in_flight += len(chunk)
            if self._in_flight > self.limits.max_bytes_in_flight:
                message = "the requests that are being answered are too large together; come back in a moment."
                raise _RefusedError(429, message, "server_busy", RETRY_AFTER_SECONDS)
            chunks.append(chunk)
        body = b"".join(chunks)
        # Of pictures that a browser uploads, such bytes say nothing.
        is_json = b"json" in dict(scope["headers"]).get(b"content-type", b"").lower()
        if is_json and sum(body.count(mark) for mark in MARKS) > self.limits.max_json_marks:
            message = f"the body has more than {self.limits.max_json_marks} commas, brackets and braces."
            raise _RefusedError(413, message, "body_too_complex")
        return {"type": "http.request", "body": body, "more_body": False}


class _Reading:
    """The chunks of one body, within its limits; `size` counts what came."""

    def __init__(self, limits: BodyLimits, receive: Receive) -> None:
        self.limits, self.receive, self.size = limits, receive, 0
        self._started, self._more = time.monotonic(), True

    def __aiter__(self) -> _Reading:
        return self

    async def __anext__(self) -> bytes:
        if not self._more:
            raise StopAsyncIteration
        try:
            async with asyncio.timeout(self._seconds_left()):
                message = await self.receive()
        except TimeoutError:
            elapsed = time.monotonic() - self._started
            raise _RefusedError(
                408, f"only {self.size} bytes of the request's body came within {elapsed:.0f} s.", "request_timeout"
            ) from None
        if message["type"] == "http.disconnect":
            raise ConnectionResetError
        self._more = message.get("more_body", False)
        chunk: bytes = message.get("body", b"")
        if self.size + len(chunk) > self.limits.max_bytes:
            raise _too_large(self.limits)
        self.size += len(chunk)
        return chunk

    def _seconds_left(self) -> float:
        """Until the next bytes must be here."""
        allowed = max(self.limits.timeout_seconds, self.size / self.limits.min_bytes_per_second)
        return max(self._started + allowed - time.monotonic(), 0.0)


def _return_freed_memory() -> None:
    """Give up the pages that glibc keeps for later; other libraries do so themselves."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _too_large(limits: BodyLimits) -> _RefusedError:
    return _RefusedError(
        413, f"the request's body is too large; {limits.max_bytes} bytes are allowed.", "body_too_large"
    )
