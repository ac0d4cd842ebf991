from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.serving.tiny_model import build_model, build_processor

os.environ.setdefault("OMP_NUM_THREADS", "1")


@dataclass(frozen=True)
class Endpoint:
    """A running server, the engine behind it, and its operations port."""

    url: str
    engine: Any
    operations_url: str = ""


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="session")
def model(processor: Any) -> Any:
    return build_model(processor)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    """A model directory as plain transformers saves it; its context is long, so that a slow answer can be had."""
    path = tmp_path_factory.mktemp("model")
    build_model(processor, context_length=4096).save_pretrained(path)
    processor.save_pretrained(path)
    return path


#: The API's own tests run twice: before the model, and before a server that is before the model.
PLACES = ["direct", pytest.param("gateway", marks=pytest.mark.slow)]


@pytest.fixture(scope="session", params=PLACES)
def endpoint(model_path: Path, request: pytest.FixtureRequest) -> Iterator[Endpoint]:
    """The API over the tiny model, with room for two requests that wait; answers of 2000 tokens take seconds."""
    from shellv_core.serving.http.config import ApiConfig, BodyLimits
    from shellv_core.serving.transformers_engine import EngineConfig

    api = ApiConfig(body=BodyLimits(max_bytes=4 << 20, timeout_seconds=2))
    with running_endpoint(model_path, api, EngineConfig(slots=1, max_waiting=2)) as endpoint:
        if request.param == "direct":
            yield endpoint
        else:
            with gateway_before(endpoint, api=api) as gateway:
                yield gateway


@pytest.fixture(scope="session")
def start_endpoint(model_path: Path) -> Any:
    """Starts an API with settings of one's own over the tiny model; a context manager."""
    return functools.partial(running_endpoint, model_path)


@contextlib.contextmanager
def running_endpoint(
    model_path: Path,
    api: Any = None,
    engine_config: Any = None,
    keys: Any = None,
    remote: Any = None,
    wrap: Any = None,
    served: Any = None,
) -> Iterator[Endpoint]:
    """The API over the tiny model; `wrap` may put something before its engine, `served` say what is served of it."""
    from shellv_core.models.compose import load_model
    from shellv_core.serving.api import create_app
    from shellv_core.serving.http.config import ApiConfig
    from shellv_core.serving.http.server import Server, bind, listening_url, running_in_thread
    from shellv_core.serving.models import FixedModels, ServedModel
    from shellv_core.serving.transformers_engine import TransformersEngine

    engine: Any = TransformersEngine(*load_model(model_path), engine_config)
    engine = wrap(engine) if wrap else engine
    models = served(engine) if served else FixedModels(ServedModel(engine, "tiny", "0" * 64))
    api = api or ApiConfig()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bind("127.0.0.1", 0))
        operations = stack.enter_context(bind("127.0.0.1", 0))
        server = Server(create_app(models, api, keys, remote), models, api.connection, operations)
        url = stack.enter_context(running_in_thread(server, listener))
        yield Endpoint(url, engine, listening_url(operations))


@contextlib.contextmanager
def gateway_before(*endpoints: Endpoint, api: Any = None, **entry: Any) -> Iterator[Endpoint]:
    """The API of a gateway whose servers are `endpoints`, with the first one's engine."""
    from urllib.parse import urlsplit

    from shellv_core.serving.gateway.config import ModelsFile

    ports = {urlsplit(each.operations_url).port for each in endpoints}
    values = {"id": "tiny", "engine": "http", "urls": [each.url for each in endpoints], **entry}
    if len(ports) == 1:
        values.setdefault("operations_port", ports.pop())
    with running_gateway(ModelsFile.model_validate({"models": [values]}), api) as gateway:
        yield Endpoint(gateway.url, endpoints[0].engine, gateway.operations_url)


@contextlib.contextmanager
def running_gateway(content: Any, api: Any = None) -> Iterator[Endpoint]:
    """The API over what a `ModelsFile` says, whose `GatewayModels` stand for its engine."""
    from shellv_core.serving.api import create_app
    from shellv_core.serving.gateway.models import GatewayModels
    from shellv_core.serving.http.server import Server, bind, listening_url, running_in_thread

    api = api or content.api
    models = GatewayModels(content)
    models.await_first()
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(bind("127.0.0.1", 0))
        operations = stack.enter_context(bind("127.0.0.1", 0))
        server = Server(create_app(models, api), models, api.connection, operations)
        url = stack.enter_context(running_in_thread(server, listener))
        yield Endpoint(url, models, listening_url(operations))
