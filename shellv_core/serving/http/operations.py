"""What is asked about the server itself: probes on both ports; metrics, load and commands on the operations port."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

from fastapi import APIRouter, FastAPI
from fastapi.responses import JSONResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel

from shellv_core import __version__
from shellv_core.serving.http.access import Access
from shellv_core.serving.http.body import BodyLimit
from shellv_core.serving.http.config import BodyLimits
from shellv_core.serving.http.errors import add_error_handlers, documented, error_body
from shellv_core.serving.http.keys import Keys
from shellv_core.serving.http.metrics import Metrics
from shellv_core.serving.http.trace import InFlight, RequestTrace
from shellv_core.serving.models import Models

ADMIN_PREFIX = "/admin/"
MAX_COMMAND_BYTES = 64 << 10


class Status(BaseModel):
    """All is well."""

    status: Literal["ok"] = "ok"


class ModelLoad(BaseModel):
    """One model's requests and places at this moment."""

    id: str
    revision: str
    running: int
    waiting: int
    slots: int


class Load(BaseModel):
    """How busy the server is; `in_flight`: requests of the API that are being answered."""

    ready: bool
    in_flight: int
    models: list[ModelLoad]


def probe_routes(models: Models) -> APIRouter:
    """``/healthz``, ``/readyz`` and ``/startupz``."""
    router = APIRouter()
    has_started = False

    @router.get("/healthz", response_model=Status, responses=documented(429, 503))
    async def check_health() -> Response:
        """Whether the process should go on living."""
        health = models.health()
        return _status(health.alive, health.reason)

    @router.get("/readyz", response_model=Status, responses=documented(429, 503))
    async def check_readiness() -> Response:
        """Whether requests should be sent here now."""
        health = models.health()
        return _status(health.alive and health.ready, health.reason)

    @router.get("/startupz", response_model=Status, responses=documented(429, 503))
    async def check_startup() -> Response:
        """Whether the models have been ready once."""
        nonlocal has_started
        health = models.health()
        has_started = has_started or health.ready
        return _status(has_started, health.reason)

    return router


def create_operations_app(
    models: Models, metrics: Metrics, in_flight: InFlight, keys: Keys | None, stop: Callable[[], None]
) -> FastAPI:
    """The application of the operations port.

    Args:
        stop: begins to drain, after which the process ends.
    """
    app = FastAPI(title="Shell-V operations", version=__version__, docs_url=None, redoc_url=None, openapi_url=None)
    add_error_handlers(app)
    app.include_router(probe_routes(models))

    @app.get("/metrics")
    async def read_metrics() -> Response:
        """The server's figures in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), headers={"content-type": CONTENT_TYPE_LATEST})

    @app.get("/internal/load")
    async def read_load() -> Load:
        """How busy the server is, for whoever spreads requests over several."""
        health = models.health()
        return Load(ready=health.alive and health.ready, in_flight=in_flight.count, models=_loads(models))

    @app.post("/admin/drain")
    async def drain() -> Status:
        """Take no more work, let what runs finish, then end, as at SIGTERM."""
        stop()
        return Status()

    @app.post("/admin/keys/reload")
    async def reload_keys() -> Status:
        """Read the file of keys again, as at SIGHUP."""
        if keys is not None:
            keys.reload()
        return Status()

    app.add_middleware(BodyLimit, limits=BodyLimits(max_bytes=MAX_COMMAND_BYTES))
    app.add_middleware(Access, keys=keys, limits=None, scope="admin", prefixes=(ADMIN_PREFIX,))
    app.add_middleware(RequestTrace, prefixes=(ADMIN_PREFIX,), in_flight=InFlight(), metrics=metrics)
    return app


def _loads(models: Models) -> list[ModelLoad]:
    loads = []
    for model in models.list():
        stats = model.engine.stats()
        loads.append(
            ModelLoad(
                id=model.name,
                revision=model.revision,
                running=stats.running,
                waiting=stats.waiting,
                slots=stats.slots,
            )
        )
    return loads


def _status(good: bool, reason: str) -> Response:
    if good:
        return JSONResponse(Status().model_dump())
    return JSONResponse(error_body(reason or "not ready", "server_error", code="not_ready"), 503)
