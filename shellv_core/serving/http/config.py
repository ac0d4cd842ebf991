"""Every limit of the HTTP API, with its default. All are on from the start."""

from __future__ import annotations

from pydantic import Field

from shellv_core.config import Config
from shellv_core.serving.images import ImageLimits
from shellv_core.serving.remote_images import RemoteImageConfig


class RequestLimits(Config):
    """What one request may ask for."""

    max_text_bytes: int = 256 << 10
    """Of all messages together, in UTF-8."""
    images: ImageLimits = ImageLimits()
    remote_images: RemoteImageConfig = RemoteImageConfig()


class BodyLimits(Config):
    """What a request's body may weigh, and how slowly it may come."""

    max_bytes: int = 24 << 20
    """Of one body, by Content-Length and as counted."""
    max_bytes_in_flight: int = 512 << 20
    """Of all requests' bodies that are being read or answered; one more is told to come back."""
    max_json_marks: int = 500_000
    """Commas, brackets and braces in one body, text included: what bounds the objects that its JSON makes."""
    timeout_seconds: float = 30.0
    """A body that has not come within this time..."""
    min_bytes_per_second: float = 10_000.0
    """...must have kept this pace."""


class ConnectionLimits(Config):
    """What a connection may do without asking anything."""

    header_timeout_seconds: float = 10.0
    """From the first byte, or the connection's begin, to the end of the headers."""
    keep_alive_seconds: int = 15
    """Silence between two requests; longer than clients allow (httpx, and so OpenAI's client: 5 s), since a request is
    lost on a connection that is just being closed."""
    write_stall_seconds: float = 30.0
    """A client that takes nothing of its answer for so long is cut off."""
    max_connections: int = 512
    """Open at once; a request on one more is answered 429."""


class Timeouts(Config):
    """How long an answer may take, in seconds."""

    request_seconds: float = 300.0
    """From the request's arrival to the answer's last token."""
    first_token_seconds: float = 60.0
    """From the request's arrival, its wait in the queue included."""
    idle_seconds: float = 30.0
    """Between two tokens."""
    ping_seconds: float = 15.0
    """A stream that has been silent for so long sends a comment, which keeps proxies from closing it."""


class KeyLimits(Config):
    """What the holder of one key may do; without keys there is one holder, and no such limit."""

    requests_per_minute: float = Field(default=600.0, gt=0)
    burst: int = Field(default=60, ge=1)
    """Requests that may come at once after a pause."""
    max_running: int = Field(default=4, ge=1)
    """Requests that are being answered, or wait, at once."""


class ApiConfig(Config):
    """Limits of the HTTP layer."""

    request: RequestLimits = RequestLimits()
    body: BodyLimits = BodyLimits()
    connection: ConnectionLimits = ConnectionLimits()
    timeouts: Timeouts = Timeouts()
    keys: KeyLimits = KeyLimits()
