"""uvicorn's HTTP/1.1 connection, with what it lacks: a deadline for headers, and one for a client that does not read.

Without the first, a connection that drips its headers stays open for ever; without the second, an answer that nobody
takes keeps its place in the model.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, ClassVar

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

from shellv_core.serving.http.config import ConnectionLimits
from shellv_core.serving.http.errors import RETRY_AFTER_SECONDS, error_body, json_response, refuse

if TYPE_CHECKING:
    from starlette.types import Receive, Scope, Send


class GuardedProtocol(H11Protocol):
    """A connection under `limits`; see `guarded_protocol`."""

    limits: ClassVar[ConnectionLimits] = ConnectionLimits()

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.access_log = False  # it names the client's address and the query
        self._header_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        """Begin to wait for headers."""
        super().connection_made(transport)
        if len(self.connections) > self.limits.max_connections:
            self.app = _too_many_connections
        self._await_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the deadlines."""
        self._headers_came()
        self._reader_came()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Take bytes; the deadline for headers ends when they are complete and begins with the next request's."""
        super().data_received(data)
        if self.cycle is not None and not self.cycle.response_complete:
            self._headers_came()
        elif self._header_timer is None and not self.transport.is_closing():
            self._await_headers()

    def on_response_complete(self) -> None:
        """Wait for the next request, whose first bytes may be here already."""
        super().on_response_complete()
        if self.conn.trailing_data[0] and (self.cycle is None or self.cycle.response_complete):
            self._await_headers()

    def pause_writing(self) -> None:
        """The client reads more slowly than we write."""
        super().pause_writing()
        self._stall_timer = self._stall_timer or self.loop.call_later(
            self.limits.write_stall_seconds, self.transport.abort
        )

    def resume_writing(self) -> None:
        """It has caught up."""
        self._reader_came()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Refuse what is not HTTP with the API's own error body."""
        if self.conn.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            self.transport.close()  # in the middle of an answer there is nothing left to say
            return
        headers, body = json_response(error_body("this is not a valid HTTP/1.1 request.", "invalid_request_error"))
        for event in (
            h11.Response(status_code=400, headers=headers, reason=b"Bad Request"),
            h11.Data(data=body),
            h11.EndOfMessage(),
        ):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _await_headers(self) -> None:
        self._headers_came()
        self._header_timer = self.loop.call_later(self.limits.header_timeout_seconds, self.transport.abort)

    def _headers_came(self) -> None:
        if self._header_timer is not None:
            self._header_timer.cancel()
            self._header_timer = None

    def _reader_came(self) -> None:
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None


def guarded_protocol(limits: ConnectionLimits) -> type[GuardedProtocol]:
    """The protocol class for a server whose connections are under `limits`."""
    return type("GuardedProtocol", (GuardedProtocol,), {"limits": limits})


async def _too_many_connections(scope: Scope, receive: Receive, send: Send) -> None:
    message = "too many connections are open; come back in a moment."
    body = error_body(message, "rate_limit_error", code="too_many_connections")
    await refuse(send, 429, body, RETRY_AFTER_SECONDS)
