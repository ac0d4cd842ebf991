"""Whether a request may pass: its key, that key's pace, and how many of its requests are under way."""

from __future__ import annotations

import math
import time
from collections import defaultdict
from typing import TYPE_CHECKING

from fastapi.responses import JSONResponse

from shellv_core.errors import ServingError
from shellv_core.serving.http.config import KeyLimits
from shellv_core.serving.http.errors import AccessError, RateLimitError, describe
from shellv_core.serving.http.keys import Key, Keys

if TYPE_CHECKING:
    from starlette.types import ASGIApp, Receive, Scope, Send


class TokenBucket:
    """Lets `burst` requests through at once and `per_minute` over time."""

    def __init__(self, per_minute: float, burst: int) -> None:
        self._rate, self._burst = per_minute / 60, float(burst)
        self._tokens, self._at = self._burst, time.monotonic()

    def take(self) -> float:
        """Take one; returns 0, or the seconds until there is one to take."""
        now = time.monotonic()
        self._tokens = min(self._burst, self._tokens + (now - self._at) * self._rate)
        self._at = now
        if self._tokens < 1:
            return (1 - self._tokens) / self._rate
        self._tokens -= 1
        return 0.0


class Access:
    """Asks requests below `prefixes` for a key of `scope`, and holds every key to its limits.

    Args:
        app: what the request is passed on to.
        keys: the keys; None lets everyone in, but to nothing that only an ``admin`` may do.
        limits: what one key may do; None for no limits, as on the operations port.
        scope: what the key must open.
        prefixes: beginnings of the paths that need one.
    """

    def __init__(
        self, app: ASGIApp, keys: Keys | None, limits: KeyLimits | None, scope: str, prefixes: tuple[str, ...]
    ) -> None:
        self.app, self.keys, self.limits, self.scope, self.prefixes = app, keys, limits, scope, prefixes
        self._buckets: dict[str, TokenBucket] = {}
        self._running: dict[str, int] = defaultdict(int)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Handle one ASGI connection."""
        guarded = scope["type"] == "http" and scope["path"].startswith(self.prefixes)
        if not guarded or (self.keys is None and self.scope != "admin"):
            await self.app(scope, receive, send)
            return
        try:
            key = self._admit(scope)
        except ServingError as error:
            status, body, headers = describe(error)
            await JSONResponse(body, status, headers)(scope, receive, send)
            return
        scope.setdefault("state", {})["holder"] = key.name
        self._running[key.name] += 1
        try:
            await self.app(scope, receive, send)
        finally:
            self._running[key.name] -= 1
            if not self._running[key.name]:
                del self._running[key.name]

    def _admit(self, scope: Scope) -> Key:
        if self.keys is None:
            raise AccessError("this needs a key, and the server was started without any (--keys).", 403)
        header = dict(scope["headers"]).get(b"authorization", b"").decode("latin-1")
        scheme, _, secret = header.partition(" ")
        if scheme.lower() != "bearer" or not secret:
            raise AccessError("a key is required: send it as Authorization: Bearer KEY.", 401)
        key = self.keys.find(secret.strip())
        if key is None:
            raise AccessError("this key is not known.", 401)
        if self.scope not in key.scopes:
            raise AccessError(f"this key does not open {self.scope}.", 403)
        if self.limits is None or not key.limited:
            return key
        if self._running[key.name] >= self.limits.max_running:
            message = f"{self.limits.max_running} requests of this key are being answered already."
            raise RateLimitError(message, 1)
        bucket = self._buckets.setdefault(key.name, TokenBucket(self.limits.requests_per_minute, self.limits.burst))
        if seconds := bucket.take():
            message = f"this key may ask {self.limits.requests_per_minute:g} times a minute."
            raise RateLimitError(message, math.ceil(seconds))
        return key
