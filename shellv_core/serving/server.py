"""One process that loads one model and serves it: API, health and chat page."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Literal

import uvicorn

from shellv_core.config import Config, fingerprint
from shellv_core.endpoint.client import endpoint_url
from shellv_core.errors import ServingError
from shellv_core.logs import get_logger
from shellv_core.models.config import Quantization
from shellv_core.serving.api import ApiConfig, create_app
from shellv_core.serving.models import FixedModels, Models, ServedModel
from shellv_core.serving.reference import fetch_adapter, fetch_model
from shellv_core.serving.transformers_engine import EngineConfig, TransformersEngine

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = get_logger(__name__)

DRAIN_SECONDS = 25.0
FLUSH_SECONDS = 2.0
POLL_SECONDS = 0.02


class ServeConfig(Config):
    """How a model is served.

    Attributes:
        model: a reference as in `shellv_core.serving.reference`.
        name: the id that clients use; None takes the reference's.
        host: the address to listen on. There is no authentication, so other than loopback belongs behind a gateway.
        port: 0 takes a free one.
        ui: whether the chat page is mounted at ``/ui``.
        device: where the model runs, as torch spells it; ``auto`` for all GPUs of this machine together.
        quantization: the language model's linear layers in 4 bits (nf4) or 8 (int8).
        adapters: LoRA adapters beside the model, unmerged: references as in `fetch_adapter`, by the id for clients.
    """

    model: str
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    ui: bool = True
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Quantization | None = None
    adapters: dict[str, str] = {}
    engine: EngineConfig = EngineConfig()
    api: ApiConfig = ApiConfig()


def serve(config: ServeConfig, until_stdin_closes: bool = False) -> None:
    """Serve until SIGTERM or SIGINT, then let running answers finish; a second signal ends at once.

    Args:
        until_stdin_closes: stop as well when the standard input ends, as a pipe does when the process at its other
            end is gone, however it went.

    Raises:
        ServingError: if the port is taken or the reference names nothing.
        ModelError: if the model cannot be loaded.
    """
    with contextlib.closing(bind(config.host, config.port)) as listener:
        server = _server(config, listener)
        if until_stdin_closes:
            threading.Thread(target=_stop_with_stdin, args=[server], name="stdin", daemon=True).start()
        # uvicorn raises the signals that it got once more when it is done; a drained server ends with 0.
        previous = {each: signal.signal(each, lambda *_: None) for each in (signal.SIGTERM, signal.SIGINT)}
        try:
            server.run(sockets=[listener])
        finally:
            for each, handler in previous.items():
                signal.signal(each, handler)


@contextlib.contextmanager
def background_server(config: ServeConfig) -> Iterator[str]:
    """Serve from a thread of this process while the context is open; yields the address.

    Raises:
        as `serve`.
    """
    with (
        contextlib.closing(bind(config.host, config.port)) as listener,
        running_in_thread(_server(config, listener), listener) as url,
    ):
        yield url


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
        yield _url(listener)
    finally:
        server.should_exit = True
        thread.join()


def _server(config: ServeConfig, listener: socket.socket) -> Server:
    files = fetch_model(config.model)
    adapters = {name: fetch_adapter(reference) for name, reference in config.adapters.items()}
    from shellv_core.serving.inference.loading import load_served

    model, processor, adapter_set = load_served(files.path, config.device, config.dtype, config.quantization, adapters)
    engine = TransformersEngine(model, processor, config.engine, adapter_set)
    served = ServedModel(engine, config.name or files.name, files.revision)
    adapted = [
        ServedModel(engine, name, fingerprint([files.revision, each.revision]), served.name, name)
        for name, each in adapters.items()
    ]
    models = FixedModels(served, *adapted)
    app = create_app(models, config.api)
    url = _url(listener)
    if config.ui:
        from shellv_core.serving.ui import mount_ui

        mount_ui(app, url, served.name)
    page = f", chat page {url}/ui" if config.ui else ""
    logger.info("serving %s (revision %s) at %s/v1%s", served.name, served.revision[:12], url, page)
    return Server(app, models)


class Server(uvicorn.Server):
    """uvicorn that waits for running answers, and for nothing else, when it is told to stop."""

    def __init__(self, app: FastAPI, models: Models) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_graceful_shutdown=int(DRAIN_SECONDS + FLUSH_SECONDS),
                limit_concurrency=512,
            )
        )
        self._models, self._in_flight = models, app.state.in_flight

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begin to stop at the first signal, end at the second, whichever they are."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Refuse new work, let running answers finish within the deadline, fail the rest, close."""
        logger.info("stopping: %d requests are being answered", self._in_flight.count)
        drained = asyncio.create_task(self._drain())
        await super().shutdown(sockets)
        await drained
        if self.force_exit:
            await self.lifespan.shutdown()

    async def _drain(self) -> None:
        drain = asyncio.create_task(self._models.drain(DRAIN_SECONDS))
        while not drain.done() and not self.force_exit:
            await asyncio.sleep(POLL_SECONDS)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(FLUSH_SECONDS):
                while self._in_flight.count and not self.force_exit:
                    await asyncio.sleep(POLL_SECONDS)
        # An open chat page holds its connection for ever; nothing of it is worth waiting for.
        self.force_exit = True


def _stop_with_stdin(server: Server) -> None:
    # Not by sys.stdin, whose lock a thread must not hold when the interpreter ends.
    while os.read(sys.stdin.fileno(), 1024):
        pass
    server.should_exit = True


def bind(host: str, port: int) -> socket.socket:
    """A socket for `host` and `port` (0 for a free one), not listening yet.

    Raises:
        ServingError: if it is taken or not this machine's.
    """
    listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise ServingError(
            f"cannot listen on {host}:{port} ({error.strerror}); choose another --port, or --port 0 for a free one."
        ) from None
    return listener


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return endpoint_url(host, port)
