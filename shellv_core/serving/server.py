"""One process that serves one model or many: API, probes, metrics and chat page."""

from __future__ import annotations

import contextlib
import functools
import ipaddress
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from shellv_core.config import Config, build_config
from shellv_core.errors import ServingError
from shellv_core.logs import get_logger
from shellv_core.models.config import Quantization
from shellv_core.serving.api import ApiConfig, create_app
from shellv_core.serving.gateway.config import ModelEntry, ModelsFile, read_models
from shellv_core.serving.gateway.models import GatewayModels
from shellv_core.serving.http.keys import Keys
from shellv_core.serving.http.server import Server, bind, listening_url, running_in_thread
from shellv_core.serving.inference.loading import Dtype
from shellv_core.serving.models import Models
from shellv_core.serving.reference import reference_name
from shellv_core.serving.transformers_engine import EngineConfig

logger = get_logger(__name__)


class ServeConfig(Config):
    """How models are served.

    Attributes:
        models_file: a ``models.yaml``, which says all that `model`, `name`, `follow`, `adapters`, `device`, `dtype`,
            `quantization`, `engine` and `api` say for one model; None for one model.
        model: a reference as in `shellv_core.serving.reference`.
        name: the id that clients use; None takes the reference's.
        follow: take up whatever an alias names later.
        adapters: LoRA adapters beside the model, unmerged: references as in `fetch_adapter`, by the id for clients.
        host: the address to listen on; other than loopback it takes `keys`, or `open_to_all`.
        port: 0 takes a free one.
        operations_host: where metrics, load and commands are; loopback, unless a network around keeps others out.
        operations_port: 0 takes a free one; None for no such port.
        keys: file of keys, made by ``shellv key new``; without one, everyone who reaches the port may ask.
        open_to_all: listen on other than loopback without keys, as behind a gateway that asks for them.
        ui: whether the chat page is mounted at ``/ui``.
        device: where the model runs, as torch spells it; ``auto`` for all GPUs of this machine together.
        quantization: the language model's linear layers in 4 bits (nf4) or 8 (int8).
        heads, thresholds: of the hallucination view, as in `ModelEntry`.
    """

    models_file: Path | None = None
    model: str = ""
    name: str | None = None
    follow: bool = True
    adapters: dict[str, str] = {}
    host: str = "127.0.0.1"
    port: int = 8000
    operations_host: str = "127.0.0.1"
    operations_port: int | None = 8001
    keys: Path | None = None
    open_to_all: bool = False
    ui: bool = True
    device: str = "cpu"
    dtype: Dtype = "float32"
    quantization: Quantization | None = None
    heads: str | None = None
    thresholds: Path | None = None
    engine: EngineConfig = EngineConfig()
    api: ApiConfig = ApiConfig()


def serve(config: ServeConfig, until_stdin_closes: bool = False) -> None:
    """Serve until SIGTERM or SIGINT, then let running answers finish; a second signal ends at once.

    SIGHUP has the file of keys, and that of models, read again.

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
        handlers[signal.SIGHUP] = signal.signal(signal.SIGHUP, lambda *_: _reload(keys, server.models))
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
    content = _content(config)
    models = GatewayModels(content, functools.partial(_content, config) if config.models_file else None)
    if len(content.models) == 1:
        models.await_first()
    app = create_app(models, content.api, keys)
    url = listening_url(listener)
    names = [*(route.id for route in content.routes), *(entry.id for entry in content.models)]
    if config.ui:
        from shellv_core.serving.ui import mount_ui

        mount_ui(app, url, names[0], keys)
    page = f", chat page {url}/ui" if config.ui else ""
    logger.info("serving %s at %s/v1%s", ", ".join(names), url, page)
    if operations is not None:
        logger.info("metrics, load and commands at %s", listening_url(operations))
    return Server(app, models, content.api.connection, operations)


def _content(config: ServeConfig) -> ModelsFile:
    if config.models_file is not None:
        return read_models(config.models_file)
    values = {
        "id": config.name or reference_name(config.model),
        "model": config.model,
        "follow": config.follow,
        "adapters": config.adapters,
        "quantization": config.quantization,
        "dtype": config.dtype,
        "device": config.device,
        "heads": config.heads,
        "thresholds": config.thresholds,
        "options": config.engine,
    }
    return ModelsFile(models=(build_config(ModelEntry, values),), api=config.api)


def _reload(keys: Keys | None, models: Models) -> None:
    if keys is not None:
        keys.reload()
    if isinstance(models, GatewayModels):
        models.reload()


def _stop_with_stdin(server: Server) -> None:
    # Not by sys.stdin, whose lock a thread must not hold when the interpreter ends.
    while os.read(sys.stdin.fileno(), 1024):
        pass
    server.stop()
