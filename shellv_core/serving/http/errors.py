"""Faults as HTTP: every response that is not a success carries OpenAI's error body."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from shellv_core.config import nearest
from shellv_core.errors import ServingError
from shellv_core.serving.engine import EngineStoppedError, QueueFullError, QueueTimeoutError, RequestError
from shellv_core.serving.models import ModelNotFoundError

if TYPE_CHECKING:
    from starlette.types import Send

RETRY_AFTER_SECONDS = 5
"""Of refusals that know no better: a server that stops, too many connections."""
UNSUPPORTED = frozenset(
    {"audio", "best_of", "echo", "function_call", "functions", "modalities", "parallel_tool_calls", "prediction",
     "reasoning_effort", "response_format", "service_tier", "store", "suffix", "tool_choice", "tools", "verbosity",
     "web_search_options"}
)  # fmt: skip
"""Fields of OpenAI's API that no model here takes, told apart from those that nobody knows."""


class RateLimitError(ServingError):
    """The holder of a key asks too often; `retry_after_seconds`: when the next request is taken."""

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class AccessError(ServingError):
    """The request has no key, or one that does not open this; `status` is 401 or 403."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class AnswerTimeoutError(ServingError):
    """The answer took longer than the server allows."""


class ClientGoneError(Exception):
    """The client closed the connection; nobody reads the answer."""


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the path of the field at fault, `code` a word for programs."""

    message: str
    type: str
    param: str | None
    code: str | None


class ErrorResponse(BaseModel):
    """Body of every response that is not a success."""

    error: ErrorDetail


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An OpenAI error body."""
    # Both may quote a client's words, which need not be encodable.
    message = message.encode(errors="replace").decode()
    param = param and param.encode(errors="replace").decode()
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def json_response(
    body: dict[str, Any], retry_after: int = 0, close: bool = True
) -> tuple[list[tuple[bytes, bytes]], bytes]:
    """Headers and bytes of a JSON response, after which the connection may be closed."""
    content = json.dumps(body).encode()
    headers = [(b"content-type", b"application/json"), (b"content-length", str(len(content)).encode())]
    if close:
        headers.append((b"connection", b"close"))
    if retry_after:
        headers.append((b"retry-after", str(retry_after).encode()))
    return headers, content


async def refuse(send: Send, status: int, body: dict[str, Any], retry_after: int = 0, close: bool = True) -> None:
    """Answer, whatever of the request is still on its way.

    A connection that is closed at once is reset, and a client that is still sending never reads why; one that is left
    open takes what comes, as long as `ConnectionLimits` let it.
    """
    headers, content = json_response(body, retry_after, close)
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": content})


def documented(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The error responses of an operation, for its description."""
    return {status: {"model": ErrorResponse, "description": DESCRIPTIONS[status]} for status in statuses}


DESCRIPTIONS = {
    400: "The request is not one that can be served; `param` names the field at fault.",
    401: "A key is required, and there is none or one that is not known.",
    403: "The key does not open this.",
    404: "There is no such model.",
    408: "The request's body did not arrive in time.",
    413: "The request's body is too large.",
    429: "Too many requests; `Retry-After` says when to come back.",
    500: "The model failed on this request.",
    503: "The server is stopping, or the request waited too long; `Retry-After` says when to come back.",
    504: "The answer took longer than the server allows.",
}


def add_error_handlers(app: FastAPI) -> None:
    """Give every fault that a route can raise its response."""

    @app.exception_handler(ServingError)
    async def serving_error(request: Request, error: ServingError) -> Response:
        status, body, headers = describe(error)
        return JSONResponse(body, status, headers)

    @app.exception_handler(RequestValidationError)
    async def validation_error(request: Request, error: RequestValidationError) -> Response:
        message, param, code = _describe_validation(error, _fields_of(request))
        return JSONResponse(error_body(message, "invalid_request_error", param, code), 400)

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


def describe(error: ServingError) -> tuple[int, dict[str, Any], dict[str, str]]:
    """HTTP status, body and headers."""
    text = str(error)
    if isinstance(error, RequestError):
        status = 404 if isinstance(error, ModelNotFoundError) else 400
        return status, error_body(text, "invalid_request_error", error.param, error.code), {}
    if isinstance(error, AccessError):
        kind, code = ("authentication_error", "invalid_api_key") if error.status == 401 else ("permission_error", None)
        headers = {"www-authenticate": "Bearer"} if error.status == 401 else {}
        return error.status, error_body(text, kind, code=code), headers
    if isinstance(error, QueueFullError | RateLimitError):
        code = "queue_full" if isinstance(error, QueueFullError) else "rate_limit_exceeded"
        return 429, error_body(text, "rate_limit_error", code=code), {"retry-after": str(error.retry_after_seconds)}
    if isinstance(error, QueueTimeoutError):
        headers = {"retry-after": str(error.retry_after_seconds)}
        return 503, error_body(text, "server_error", code="queue_timeout"), headers
    if isinstance(error, EngineStoppedError):
        return 503, error_body(text, "server_error", code=error.code), {"retry-after": str(RETRY_AFTER_SECONDS)}
    if isinstance(error, AnswerTimeoutError):
        return 504, error_body(text, "server_error", code="timeout"), {}
    return 500, error_body(text, "server_error", code="generation_failed"), {}


def _fields_of(request: Request) -> list[str]:
    """The fields of the body that the request's route takes."""
    body = getattr(request.scope.get("route"), "body_field", None)
    model = getattr(getattr(body, "field_info", None), "annotation", None)
    return list(model.model_fields) if isinstance(model, type) and issubclass(model, BaseModel) else []


def _describe_validation(error: RequestValidationError, fields: list[str]) -> tuple[str, str | None, str | None]:
    """The first fault as one sentence, the path of its field in the body, and a code."""
    fault = error.errors()[0]
    if fault["type"] == "json_invalid":
        return "the request's body is not valid JSON.", None, None
    param = _path(fault["loc"][1:], error.body)
    if fault["type"] == "extra_forbidden":
        if param in UNSUPPORTED:
            return f"{param} is not supported by this model; leave it out.", param, "unsupported_parameter"
        hint = f"; {nearest(param, fields)}" if fields and "." not in param and "[" not in param else ""
        return f"{param} is not a parameter of this endpoint{hint}.", param, "unknown_parameter"
    message = str(fault["msg"]).removeprefix("Value error, ")
    return f"{param or 'the request'}: {message[0].lower()}{message[1:]}.", param or None, None


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
