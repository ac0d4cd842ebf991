"""The OpenAI-compatible HTTP API over an engine.

Knows nothing of torch, of where the model came from, or of who serves it. Every response that is not a success
carries OpenAI's error body.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from shellv_core import __version__
from shellv_core.config import Config, nearest
from shellv_core.errors import ServingError
from shellv_core.logs import get_logger
from shellv_core.serving.engine import (
    EngineStoppedError,
    GenerationError,
    QueueFullError,
    RequestError,
    TokenEvent,
)
from shellv_core.serving.middleware import BodyLimit, InFlight, RequestTrace
from shellv_core.serving.models import ModelNotFoundError, Models, ServedModel
from shellv_core.serving.schema import (
    AnswerMessage,
    ChatCompletion,
    ChatCompletionChunk,
    ChatRequest,
    Choice,
    ChunkChoice,
    Delta,
    ErrorResponse,
    ModelCard,
    ModelList,
    RequestLimits,
    Usage,
    error_body,
    to_generation_request,
)

logger = get_logger(__name__)
T = TypeVar("T")
Events = AsyncGenerator[TokenEvent, None]

API_PREFIX = "/v1/"
RETRY_AFTER_SHUTDOWN_SECONDS = 5
DONE = b"data: [DONE]\n\n"


class ApiConfig(Config):
    """Limits of the HTTP layer."""

    max_body_bytes: int = 24 << 20
    body_timeout_seconds: float = 60.0
    request_timeout_seconds: float = 300.0
    """From the request's arrival to the answer's last token."""
    request: RequestLimits = RequestLimits()


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads the answer."""


def create_app(models: Models, config: ApiConfig | None = None) -> FastAPI:
    """The application that answers for `models`.

    Its ``state.in_flight`` counts the API requests that are being answered.
    """
    config = config or ApiConfig()
    # The interactive documentation would load scripts from a public network.
    app = FastAPI(title="Shell-V", version=__version__, docs_url=None, redoc_url=None)
    _add_error_handlers(app)
    _add_routes(app, models, config)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes, timeout_seconds=config.body_timeout_seconds)
    app.state.in_flight = InFlight()
    app.add_middleware(RequestTrace, api_prefix=API_PREFIX, in_flight=app.state.in_flight)
    return app


def _add_routes(app: FastAPI, models: Models, config: ApiConfig) -> None:
    errors: dict[int | str, dict[str, Any]] = {"4XX": {"model": ErrorResponse}, "5XX": {"model": ErrorResponse}}

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=errors)
    async def create_chat_completion(body: ChatRequest, request: Request) -> Response:
        """Continue a conversation; with ``stream`` as server-sent events that end with ``[DONE]``."""
        model = models.find(body.model)
        headers = {"x-model-revision": model.revision}
        answer = _Answer(model, time.monotonic() + config.request_timeout_seconds)
        events = await _unless_disconnected(request, answer.begin(body, config.request))
        if body.stream:
            include_usage = body.stream_options is not None and body.stream_options.include_usage
            return _EventStream(events, answer.stream(events, include_usage), headers)
        async with contextlib.aclosing(events):
            completion = await _unless_disconnected(request, answer.collect(events))
        return JSONResponse(completion.model_dump(), headers=headers)

    @app.get("/v1/models")
    async def list_models() -> ModelList:
        """The models that are served."""
        cards = [
            ModelCard(
                id=model.name,
                created=model.created,
                parent=model.parent,
                revision=model.revision,
                context_length=model.engine.context_length,
            )
            for model in models.list()
        ]
        return ModelList(data=cards)

    @app.get("/healthz", responses={503: {"model": ErrorResponse}})
    async def check_health() -> Response:
        """Whether the process should go on living."""
        health = models.health()
        return _health(health.alive, health.reason)

    @app.get("/readyz", responses={503: {"model": ErrorResponse}})
    async def check_readiness() -> Response:
        """Whether requests should be sent here now."""
        health = models.health()
        return _health(health.alive and health.ready, health.reason)


def _health(good: bool, reason: str) -> Response:
    if good:
        return JSONResponse({"status": "ok"})
    return JSONResponse(error_body(reason, "server_error", code="not_ready"), 503)


class _Answer:
    """One answer on its way from the engine to the client, whole or in chunks."""

    def __init__(self, model: ServedModel, deadline: float) -> None:
        self._model, self._deadline = model, deadline
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._created = int(time.time())

    async def begin(self, body: ChatRequest, limits: RequestLimits) -> Events:
        """The engine's events, once it has accepted the request, so that a refusal still has an HTTP status."""
        request = await asyncio.to_thread(to_generation_request, body, limits)
        events = self._model.engine.generate(request)
        await self._next(events)
        return events

    async def collect(self, events: Events) -> ChatCompletion:
        """The whole answer."""
        texts: list[str] = []
        while True:
            event = await self._next(events)
            texts.append(event.text)
            if event.finish_reason is not None:
                return ChatCompletion(
                    id=self._id,
                    created=self._created,
                    model=self._model.name,
                    system_fingerprint=self._model.revision[:16],
                    choices=[Choice(message=AnswerMessage(content="".join(texts)), finish_reason=event.finish_reason)],
                    usage=_usage(event),
                )

    async def stream(self, events: Events, include_usage: bool) -> AsyncGenerator[bytes, None]:
        """The answer as server-sent events; a failure becomes an error event."""
        yield self._chunk(ChunkChoice(delta=Delta(role="assistant", content="")))
        try:
            while True:
                event = await self._next(events)
                if event.text:
                    yield self._chunk(ChunkChoice(delta=Delta(content=event.text)))
                if event.finish_reason is not None:
                    break
        except ServingError as error:
            yield b"data: " + JSONResponse(_describe(error)[1]).body + b"\n\n" + DONE
            return
        yield self._chunk(ChunkChoice(delta=Delta(), finish_reason=event.finish_reason))
        if include_usage:
            yield self._chunk(usage=_usage(event))
        yield DONE

    async def _next(self, events: Events) -> TokenEvent:
        try:
            async with asyncio.timeout(max(self._deadline - time.monotonic(), 0)):
                return await anext(events)
        except TimeoutError:
            raise GenerationError("the answer took longer than the server allows; ask for fewer tokens.") from None

    def _chunk(self, choice: ChunkChoice | None = None, usage: Usage | None = None) -> bytes:
        chunk = ChatCompletionChunk(
            id=self._id,
            created=self._created,
            model=self._model.name,
            system_fingerprint=self._model.revision[:16],
            choices=[choice] if choice else [],
            usage=usage,
        )
        # A chunk's delta holds only what it adds; a choice's finish_reason is there even while it is null.
        content = chunk.model_dump(exclude_none=True)
        for each in content["choices"]:
            each.setdefault("finish_reason", None)
        return b"data: " + JSONResponse(content).body + b"\n\n"


class _EventStream(StreamingResponse):
    """A stream that closes `events`, its source, at once when the client goes, wherever the stream stands then."""

    def __init__(self, events: Events, body: AsyncGenerator[bytes, None], headers: dict[str, str]) -> None:
        super().__init__(body, media_type="text/event-stream", headers={"cache-control": "no-store", **headers})
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with contextlib.aclosing(self._events):
            await super().__call__(scope, receive, send)


def _usage(event: TokenEvent) -> Usage:
    return Usage(
        prompt_tokens=event.prompt_tokens,
        completion_tokens=event.completion_tokens,
        total_tokens=event.prompt_tokens + event.completion_tokens,
    )


async def _unless_disconnected(request: Request, work: Awaitable[T]) -> T:
    """The result of `work`, which is cancelled when the client goes first.

    Raises:
        ClientGoneError: if it did.
    """
    task = asyncio.ensure_future(work)
    watch = asyncio.ensure_future(_disconnection(request))
    try:
        await asyncio.wait([task, watch], return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientGoneError
        return task.result()
    finally:
        for each in (task, watch):
            each.cancel()
        await asyncio.gather(task, watch, return_exceptions=True)


async def _disconnection(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _add_error_handlers(app: FastAPI) -> None:
    @app.exception_handler(ServingError)
    async def serving_error(request: Request, error: ServingError) -> Response:
        status, body, headers = _describe(error)
        return JSONResponse(body, status, headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        message, param = _describe_validation(error)
        return JSONResponse(error_body(message, "invalid_request_error", param), 400)

    @app.exception_handler(HTTPException)
    async def http_error(request: Request, error: HTTPException) -> Response:
        message = f"{request.method} {request.url.path}: {error.detail}"
        return JSONResponse(error_body(message, "invalid_request_error"), error.status_code, error.headers)

    @app.exception_handler(ClientGoneError)
    async def client_gone(request: Request, error: ClientGoneError) -> Response:
        return Response(status_code=499)

    @app.exception_handler(Exception)
    async def unexpected(request: Request, error: Exception) -> Response:
        request_id = request.state.request_id
        message = f"the server failed on this request ({request_id}); its log says why."
        return JSONResponse(error_body(message, "server_error"), 500, {"x-request-id": request_id})


def _describe(error: ServingError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """HTTP status, body and headers."""
    if isinstance(error, RequestError):
        status = 404 if isinstance(error, ModelNotFoundError) else 400
        return status, error_body(str(error), "invalid_request_error", error.param, error.code), {}
    if isinstance(error, QueueFullError):
        headers = {"retry-after": str(error.retry_after_seconds)}
        return 429, error_body(str(error), "rate_limit_error", code="queue_full"), headers
    if isinstance(error, EngineStoppedError):
        headers = {"retry-after": str(RETRY_AFTER_SHUTDOWN_SECONDS)}
        return 503, error_body(str(error), "server_error", code="shutting_down"), headers
    return 500, error_body(str(error), "server_error", code="generation_failed"), {}


def _describe_validation(error: RequestValidationError) -> tuple[str, str | None]:
    """The first fault as one sentence, and the path of its field in the body."""
    fault = error.errors()[0]
    if fault["type"] == "json_invalid":
        return "the request's body is not valid JSON.", None
    param = _path(fault["loc"][1:], error.body)
    if fault["type"] == "extra_forbidden":
        known = ChatRequest.model_fields if "." not in param and "[" not in param else []
        hint = f"; {nearest(param, known)}" if known else ""
        return f"{param} is not a parameter of this endpoint{hint}.", param
    message = str(fault["msg"])
    return f"{param or 'the request'}: {message[0].lower()}{message[1:]}.", param or None


def _path(location: Any, body: Any) -> str:
    """``messages[0].content`` from a validator's location, in which the names of a union's branches stand too."""
    path, level = "", body
    steps = list(location)
    for index, step in enumerate(steps):
        last = index == len(steps) - 1
        if isinstance(level, list) and isinstance(step, int) and step < len(level):
            path, level = f"{path}[{step}]", level[step]
        elif isinstance(level, dict) and isinstance(step, str) and (step in level or last):
            path, level = f"{path}.{step}".lstrip("."), level.get(step)
    return path
