"""What holds for every request: an id, its place in a distributed trace, a count, and a log line without content."""

from __future__ import annotations

import contextvars
import re
import secrets
import time
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING

from shellv_core.logs import get_logger

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Message, Receive, Scope, Send

    from shellv_core.serving.http.metrics import Metrics

logger = get_logger(__name__)

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
TRACEPARENT = re.compile(
    r"00-(?P<trace>(?!0{32})[0-9a-f]{32})-(?P<parent>(?!0{16})[0-9a-f]{16})-(?P<flags>[0-9a-f]{2})"
)


@dataclass(frozen=True)
class Trace:
    """What a request that is made on behalf of this one should carry, as ``x-request-id`` and ``traceparent``."""

    request_id: str
    traceparent: str


current_trace: contextvars.ContextVar[Trace | None] = contextvars.ContextVar("current_trace", default=None)


@dataclass
class InFlight:
    """A count of requests that are being answered."""

    count: int = 0


class RequestTrace:
    """Gives every request an id and a span, returns them as headers, and logs and counts requests below `prefixes`.

    The id is the client's own ``x-request-id`` where it is well-formed; the span is a child of the client's W3C
    ``traceparent`` where there is one, else the root of a trace of its own. Nothing of the client's address, of the
    query, or of bodies is logged.
    """

    def __init__(self, app: ASGIApp, prefixes: tuple[str, ...], in_flight: InFlight, metrics: Metrics) -> None:
        self.app, self.prefixes, self.in_flight, self.metrics = app, prefixes, in_flight, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        headers = dict(scope["headers"])
        asked = headers.get(b"x-request-id", b"").decode("latin-1")
        request_id = asked if REQUEST_ID.fullmatch(asked) else uuid.uuid4().hex
        traceparent = _traceparent(headers.get(b"traceparent", b"").decode("latin-1"))
        state = scope.setdefault("state", {})
        state["request_id"], state["traceparent"], state["holder"] = request_id, traceparent, "-"
        current_trace.set(Trace(request_id, traceparent))
        added = [(b"x-request-id", request_id.encode()), (b"traceparent", traceparent.encode())]
        status = 0

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), *added]
            await send(message)

        is_api = scope["path"].startswith(self.prefixes)
        started = time.monotonic()
        self.in_flight.count += is_api
        try:
            await self.app(scope, receive, send_with_id)
        finally:
            self.in_flight.count -= is_api
            if is_api:
                self._report(scope, status, time.monotonic() - started)

    def _report(self, scope: Scope, status: int, elapsed: float) -> None:
        route, state = scope.get("route"), scope["state"]
        # The path is the client's text, and as a label it would be without bound.
        path = getattr(route, "path", "other")
        self.metrics.responses.labels(path, str(status)).inc()
        logger.info(
            "%s %s %s %s %s %d %.2f s",
            state["request_id"], state["traceparent"][3:35], state["holder"], scope["method"], path, status, elapsed,
        )  # fmt: skip


def _traceparent(asked: str) -> str:
    match = TRACEPARENT.fullmatch(asked)
    trace, flags = (match["trace"], match["flags"]) if match else (secrets.token_hex(16), "00")
    return f"00-{trace}-{secrets.token_hex(8)}-{flags}"
