"""uvicorn as this project runs it: guarded connections, two ports, and an end that cuts no answer."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Literal

import uvicorn

from shellv_core.endpoint.client import endpoint_url
from shellv_core.errors import ServingError
from shellv_core.logs import get_logger
from shellv_core.serving.http.config import ConnectionLimits
from shellv_core.serving.http.operations import create_operations_app
from shellv_core.serving.http.protocol import guarded_protocol
from shellv_core.serving.models import Models

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = get_logger(__name__)

DRAIN_SECONDS = 25.0
FLUSH_SECONDS = 2.0
POLL_SECONDS = 0.02


class Server(uvicorn.Server):
    """uvicorn that, told to stop, refuses new work, waits for running answers and for nothing else.

    Args:
        app: made by `create_app`.
        models: what it serves.
        limits: of its connections.
        operations: a bound socket for metrics, load and commands; None for none.
    """

    def __init__(
        self,
        app: FastAPI,
        models: Models,
        limits: ConnectionLimits | None = None,
        operations: socket.socket | None = None,
    ) -> None:
        limits = limits or ConnectionLimits()
        super().__init__(_uvicorn_config(app, limits))
        self.models, self._in_flight = models, app.state.in_flight
        self._operations = operations
        self._inner: _InnerServer | None = None
        if operations is not None:
            operations_app = create_operations_app(
                models, app.state.metrics, app.state.in_flight, app.state.keys, self.stop
            )
            self._inner = _InnerServer(_uvicorn_config(operations_app, limits, lifespan="off"))
        self._inner_task: asyncio.Task[None] | None = None
        self._drained: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    def stop(self) -> None:
        """Begin to drain; the server ends when that is done. From any thread, or a signal's handler."""
        if self._loop is None:
            self.should_exit = True
        else:
            self._loop.call_soon_threadsafe(self._begin_to_drain)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop at the first signal, end at the second, whichever they are."""
        if self._drained is not None:
            self.force_exit = self.should_exit = True
        self.stop()

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen on both ports."""
        self._loop = asyncio.get_running_loop()
        await super().startup(sockets)
        if self._inner is not None and self._operations is not None:
            self._inner_task = asyncio.create_task(self._inner.serve([self._operations]))

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Drain if that was not done yet, then close."""
        await self._begin_to_drain()
        # An open chat page holds its connection for ever; nothing of it is worth waiting for.
        self.force_exit = True
        await super().shutdown(sockets)
        await self.lifespan.shutdown()
        if self._inner is not None and self._inner_task is not None:
            self._inner.should_exit = self._inner.force_exit = True
            await self._inner_task

    def _begin_to_drain(self) -> asyncio.Task[None]:
        if self._drained is None:
            logger.info("stopping: %d requests are being answered", self._in_flight.count)
            self._drained = asyncio.create_task(self._drain())
        return self._drained

    async def _drain(self) -> None:
        """Refuse new work, let running answers finish within the deadline, fail the rest."""
        drain = asyncio.create_task(self.models.drain(DRAIN_SECONDS))
        while not drain.done() and not self.force_exit:
            await asyncio.sleep(POLL_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                while self._in_flight.count and not self.force_exit:
                    await asyncio.sleep(POLL_SECONDS)
        self.should_exit = True


class _InnerServer(uvicorn.Server):
    """A server beside another in the same event loop, which alone takes the signals."""

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()


def _uvicorn_config(app: FastAPI, limits: ConnectionLimits, lifespan: Literal["on", "off"] = "on") -> uvicorn.Config:
    return uvicorn.Config(
        app,
        lifespan=lifespan,
        http=guarded_protocol(limits),
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=limits.keep_alive_seconds,
    )


@contextlib.contextmanager
def running_in_thread(server: Server, listener: socket.socket) -> Iterator[str]:
    """Run `server` on `listener` in a thread while the context is open; yields the address.

    Raises:
        ServingError: if it does not start.
    """
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="server", daemon=True)
    thread.start()
    while not server.started:
        thread.join(POLL_SECONDS)
        if not thread.is_alive():
            raise ServingError("the server's thread ended before it listened; the log says why.")
    try:
        yield listening_url(listener)
    finally:
        server.should_exit = True
        thread.join()


def bind(host: str, port: int, option: str = "--port") -> socket.socket:
    """A socket for `host` and `port` (0 for a free one), not listening yet.

    Args:
        option: what sets the port, for the error.

    Raises:
        ServingError: if it is taken or not this machine's.
    """
    # asyncio turns Nagle's algorithm off only where the protocol is named; with it, each token waits for the client's
    # acknowledgement of the one before, which comes 40 ms late.
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ServingError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another {option}, or {option} 0 for a free one."
        ) from None
    return listener


def listening_url(listener: socket.socket) -> str:
    """The address under which this machine reaches `listener`."""
    host, port = listener.getsockname()[:2]
    return endpoint_url(host, port)
