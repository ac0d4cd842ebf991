"""A client of the endpoint, for the terminal chat, the chat page and the deploy stage."""

from __future__ import annotations

import base64
import json
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from shellv_core.errors import ServingError

if TYPE_CHECKING:
    import httpx

# First bytes of each kind of picture that the endpoint reads.
SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}
CONNECT_TIMEOUT_SECONDS = 5.0
READINESS_TIMEOUT_SECONDS = 2.0
READ_TIMEOUT_SECONDS = 300.0


class EndpointError(ServingError):
    """The endpoint refused or failed; `status` is the HTTP status, 0 where there was none."""

    def __init__(self, message: str, status: int = 0) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class AnswerPiece:
    """New text of an answer; the last pieces carry `finish_reason` and `usage` (token counts)."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, int] | None = None


def image_data_url(data: bytes) -> str:
    """``data:`` URL of a picture file's bytes.

    Raises:
        ServingError: if it is no picture that the endpoint reads.
    """
    for signature, kind in SIGNATURES.items():
        if data.startswith(signature):
            return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"
    raise ServingError(f"this file is not a picture that can be sent; allowed: {', '.join(SIGNATURES.values())}.")


def user_message(text: str, image: bytes | None = None) -> dict[str, Any]:
    """A user's turn, with the picture first."""
    if image is None:
        return {"role": "user", "content": text}
    picture = {"type": "image_url", "image_url": {"url": image_data_url(image)}}
    return {"role": "user", "content": [picture, {"type": "text", "text": text}]}


def endpoint_url(host: str, port: int) -> str:
    """The address under which this machine reaches a server that listens on `host`, which may stand for all."""
    host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(host, host)  # noqa: S104  compared, not bound
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


class EndpointClient:
    """Talks to the API at `url`, for example ``http://127.0.0.1:8000``."""

    def __init__(self, url: str) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")

    async def model(self) -> dict[str, Any]:
        """Id, revision and context length of the served model.

        Raises:
            EndpointError: if nothing answers there.
        """
        async with self._http() as http:
            response = await _sent(http, "GET", f"{self.url}/v1/models")
            model: dict[str, Any] = _content(response)["data"][0]
            return model

    async def check_readiness(self) -> None:
        """Return if the endpoint takes requests now.

        Raises:
            EndpointError: if it does not.
        """
        async with self._http() as http:
            _content(await _sent(http, "GET", f"{self.url}/readyz", timeout=READINESS_TIMEOUT_SECONDS))

    async def answer(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """The whole answer to `messages`; `options` as in the API."""
        async with self._http() as http:
            response = await _sent(
                http, "POST", f"{self.url}/v1/chat/completions", json={"messages": list(messages), **options}
            )
            text: str = _content(response)["choices"][0]["message"]["content"]
            return text

    async def stream(self, messages: Sequence[dict[str, Any]], **options: Any) -> AsyncGenerator[AnswerPiece, None]:
        """The answer piece by piece; closing the generator cancels it at the server.

        Raises:
            EndpointError: if the request is refused or fails on the way.
        """
        import httpx

        body = {"messages": list(messages), "stream": True, "stream_options": {"include_usage": True}, **options}
        async with self._http() as http:
            try:
                async with http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as response:
                    if response.is_error:
                        await response.aread()
                        _content(response)
                    async for line in response.aiter_lines():
                        field, _, data = line.partition(": ")
                        if data == "[DONE]":
                            return
                        if field == "data":
                            yield _piece(json.loads(data), response.status_code)
            except httpx.HTTPError as error:
                raise _unreachable(self.url, error) from None
        raise EndpointError(f"{self.url} ended the connection in the middle of the answer.")

    def _http(self) -> httpx.AsyncClient:
        import httpx

        host = urlsplit(self.url).hostname or ""
        return httpx.AsyncClient(
            timeout=httpx.Timeout(READ_TIMEOUT_SECONDS, connect=CONNECT_TIMEOUT_SECONDS),
            # A proxy from the environment cannot reach this machine's own addresses.
            trust_env=host not in ("localhost", "::1") and not host.startswith("127."),
        )


async def _sent(http: httpx.AsyncClient, method: str, url: str, **options: Any) -> httpx.Response:
    import httpx

    try:
        return await http.request(method, url, **options)
    except httpx.HTTPError as error:
        raise _unreachable(url, error) from None


def _content(response: httpx.Response) -> dict[str, Any]:
    try:
        content = response.json()
    except ValueError:
        content = None
    if not isinstance(content, dict):
        raise EndpointError(
            f"{response.url} answered with HTTP {response.status_code} and no JSON; is it the address of this API?",
            response.status_code,
        )
    if response.is_error:
        raise _failure(content, response.status_code)
    return content


def _failure(content: dict[str, Any], status: int) -> EndpointError:
    error = content.get("error")
    message = error.get("message") if isinstance(error, dict) else content
    return EndpointError(f"the endpoint says: {message}", status)


def _piece(chunk: dict[str, Any], status: int) -> AnswerPiece:
    if "error" in chunk:
        raise _failure(chunk, status)
    if not chunk["choices"]:
        return AnswerPiece(usage=chunk.get("usage"))
    choice = chunk["choices"][0]
    return AnswerPiece(choice["delta"].get("content") or "", choice.get("finish_reason"), chunk.get("usage"))


def _unreachable(url: str, error: Exception) -> EndpointError:
    reason = str(error) or type(error).__name__
    return EndpointError(f"{url} does not answer ({reason}). Start it with: shellv serve --model MODEL")
