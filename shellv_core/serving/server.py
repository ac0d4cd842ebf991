"""One process that loads one model and serves it: API, probes, metrics and chat page."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from shellv_core.config import Config, fingerprint
from shellv_core.errors import ServingError
from shellv_core.logs import get_logger
from shellv_core.models.config import Quantization
from shellv_core.serving.api import ApiConfig, create_app
from shellv_core.serving.http.keys import Keys
from shellv_core.serving.http.server import Server, bind, listening_url, running_in_thread
from shellv_core.serving.models import FixedModels, ServedModel
from shellv_core.serving.reference import fetch_adapter, fetch_model
from shellv_core.serving.transformers_engine import EngineConfig, TransformersEngine

logger = get_logger(__name__)


class ServeConfig(Config):
    """How a model is served.

    Attributes:
        model: a reference as in `shellv_core.serving.reference`.
        name: the id that clients use; None takes the reference's.
        host: the address to listen on; other than loopback it takes `keys`, or `open_to_all`.
        port: 0 takes a free one.
        operations_host: where metrics, load and commands are; loopback, unless a network around keeps others out.
        operations_port: 0 takes a free one; None for no such port.
        keys: file of keys, made by ``shellv key new``; without one, everyone who reaches the port may ask.
        open_to_all: listen on other than loopback without keys, as behind a gateway that asks for them.
        ui: whether the chat page is mounted at ``/ui``.
        device: where the model runs, as torch spells it; ``auto`` for all GPUs of this machine together.
        quantization: the language model's linear layers in 4 bits (nf4) or 8 (int8).
        adapters: LoRA adapters beside the model, unmerged: references as in `fetch_adapter`, by the id for clients.
    """

    model: str
    name: str | None = None
    host: str = "127.0.0.1"
    port: int = 8000
    operations_host: str = "127.0.0.1"
    operations_port: int | None = 8001
    keys: Path | None = None
    open_to_all: bool = False
    ui: bool = True
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    quantization: Quantization | None = None
    adapters: dict[str, str] = {}
    engine: EngineConfig = EngineConfig()
    api: ApiConfig = ApiConfig()


def serve(config: ServeConfig, until_stdin_closes: bool = False) -> None:
    """Serve until SIGTERM or SIGINT, then let running answers finish; a second signal ends at once.

    SIGHUP has the file of keys read again.

    Args:
        until_stdin_closes: stop as well when the standard input ends, as a pipe does when the process at its other
            end is gone, however it went.

    Raises:
        ServingError: if a port is taken, the reference names nothing, the keys cannot be read, or everyone would be
            let in.
        ModelError: if the model cannot be loaded.
    """
    keys = _keys(config)
    with contextlib.ExitStack() as stack:
        listener, operations = _listeners(config, stack)
        server = _server(config, keys, listener, operations)
        if until_stdin_closes:
            threading.Thread(target=_stop_with_stdin, args=[server], name="stdin", daemon=True).start()
        # uvicorn raises the signals that it got once more when it is done; a drained server ends with 0.
        handlers: dict[int, Any] = {
            each: signal.signal(each, lambda *_: None) for each in (signal.SIGTERM, signal.SIGINT)
        }
        if keys is not None:
            handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: keys.reload())
        try:
            server.run(sockets=[listener])
        finally:
            for each, handler in handlers.items():
                signal.signal(each, handler)


@contextlib.contextmanager
def background_server(config: ServeConfig) -> Iterator[str]:
    """Serve from a thread of this process while the context is open; yields the address.

    Raises:
        as `serve`.
    """
    with contextlib.ExitStack() as stack:
        listener, operations = _listeners(config, stack)
        server = _server(config, _keys(config), listener, operations)
        yield stack.enter_context(running_in_thread(server, listener))


def _keys(config: ServeConfig) -> Keys | None:
    if config.keys is not None:
        return Keys(config.keys)
    if not (config.open_to_all or _is_loopback(config.host)):
        raise ServingError(
            f"everyone who reaches {config.host} could use the model: give --keys FILE (made by `shellv key new`), or"
            " --open-to-all where something in front asks for keys."
        )
    return None


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _listeners(config: ServeConfig, stack: contextlib.ExitStack) -> tuple[socket.socket, socket.socket | None]:
    listener = stack.enter_context(contextlib.closing(bind(config.host, config.port)))
    if config.operations_port is None:
        return listener, None
    operations = bind(config.operations_host, config.operations_port, "--operations-port")
    return listener, stack.enter_context(contextlib.closing(operations))


def _server(
    config: ServeConfig, keys: Keys | None, listener: socket.socket, operations: socket.socket | None
) -> Server:
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
    app = create_app(models, config.api, keys)
    url = listening_url(listener)
    if config.ui:
        from shellv_core.serving.ui import mount_ui

        mount_ui(app, url, served.name, keys)
    page = f", chat page {url}/ui" if config.ui else ""
    logger.info("serving %s (revision %s) at %s/v1%s", served.name, served.revision[:12], url, page)
    if operations is not None:
        logger.info("metrics, load and commands at %s", listening_url(operations))
    return Server(app, models, config.api.connection, operations)


def _stop_with_stdin(server: Server) -> None:
    # Not by sys.stdin, whose lock a thread must not hold when the interpreter ends.
    while os.read(sys.stdin.fileno(), 1024):
        pass
    server.stop()
