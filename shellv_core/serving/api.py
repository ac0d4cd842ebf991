"""The OpenAI-compatible HTTP API over whatever models are served."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator
from typing import Any

from fastapi import FastAPI

from shellv_core import __version__
from shellv_core.serving.http.access import Access
from shellv_core.serving.http.body import BodyLimit
from shellv_core.serving.http.chat_bodies import ChatCompletionChunk
from shellv_core.serving.http.config import ApiConfig
from shellv_core.serving.http.errors import add_error_handlers
from shellv_core.serving.http.keys import Keys
from shellv_core.serving.http.metrics import Metrics
from shellv_core.serving.http.operations import probe_routes
from shellv_core.serving.http.requests import Reader
from shellv_core.serving.http.routes import Api, catalog_routes, generation_routes
from shellv_core.serving.http.trace import InFlight, RequestTrace
from shellv_core.serving.image_decoder import ImageDecoder
from shellv_core.serving.models import Models
from shellv_core.serving.remote_images import RemoteImages

__all__ = ["API_PREFIXES", "ApiConfig", "create_app"]

API_PREFIXES = ("/v1/", "/tokenize")
"""What needs a key, is counted and is logged."""


def create_app(
    models: Models, config: ApiConfig | None = None, keys: Keys | None = None, remote: RemoteImages | None = None
) -> FastAPI:
    """The application that answers for `models`.

    Its ``state`` holds `in_flight`, which counts the requests that are being answered, and `metrics`.

    Args:
        config: limits.
        keys: who may ask; None lets everyone.
        remote: fetches pictures of other hosts; None makes the one that `config` says.
    """
    config = config or ApiConfig()
    limits = config.request
    in_flight = InFlight()
    metrics = Metrics(models, in_flight)
    decoder = ImageDecoder(limits.images)
    remote = remote or RemoteImages(limits.remote_images, limits.images.max_bytes)

    @contextlib.asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        await asyncio.to_thread(decoder.close)

    # The interactive documentation would load scripts from a public network.
    app = FastAPI(
        title="Shell-V", version=__version__, docs_url=None, redoc_url=None, redirect_slashes=False, lifespan=lifespan
    )
    add_error_handlers(app)
    api = Api(models, Reader(limits, decoder, remote), config, metrics)
    app.include_router(generation_routes(api))
    app.include_router(catalog_routes(api))
    app.include_router(probe_routes(models))
    _describe_truly(app, keys)
    app.add_middleware(BodyLimit, limits=config.body)
    app.add_middleware(Access, keys=keys, limits=config.keys, scope="chat", prefixes=API_PREFIXES)
    app.add_middleware(RequestTrace, prefixes=API_PREFIXES, in_flight=in_flight, metrics=metrics)
    app.state.in_flight, app.state.metrics, app.state.keys = in_flight, metrics, keys
    return app


def _describe_truly(app: FastAPI, keys: Keys | None) -> None:
    """Take out of the API's description what FastAPI assumes and is not so, and put in what it cannot know."""
    generate = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema:
            return app.openapi_schema
        schema = generate()
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)
                if keys is not None and path.startswith(API_PREFIXES):
                    operation["security"] = [{"key": []}]
        schemas = schema["components"]["schemas"]
        for name in ("HTTPValidationError", "ValidationError"):
            schemas.pop(name, None)
        chunk = ChatCompletionChunk.model_json_schema(ref_template="#/components/schemas/{model}")
        schemas.update(chunk.pop("$defs"), ChatCompletionChunk=chunk)
        if keys is not None:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        return schema

    app.openapi = openapi  # type: ignore[method-assign]
