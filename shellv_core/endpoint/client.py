"""A client of the OpenAI chat protocol: of this project's own endpoint and of anyone's."""

from __future__ import annotations

import base64
import json
import time
from collections.abc import AsyncGenerator, AsyncIterator, Sequence
from contextlib import aclosing, asynccontextmanager
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from shellv_core.errors import ServingError

if TYPE_CHECKING:
    import ssl

    import httpx

# First bytes of each kind of picture that the endpoint reads.
SIGNATURES = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpeg", b"RIFF": "webp", b"GIF8": "gif"}
CONNECT_TIMEOUT_SECONDS = 5.0
READINESS_TIMEOUT_SECONDS = 2.0
READ_TIMEOUT_SECONDS = 300.0


class EndpointError(ServingError):
    """The endpoint refused or failed.

    Attributes:
        status: the HTTP status, 0 where there was none.
        retry_after_seconds: how long the endpoint asks to be left alone, None where it says nothing.
        param: the request's field that the endpoint names as at fault.
        code: the endpoint's own word for the fault.
        reached: False if no connection came about, so that nothing can have been done.
    """

    def __init__(
        self,
        message: str,
        status: int = 0,
        retry_after_seconds: float | None = None,
        *,
        param: str | None = None,
        code: str | None = None,
        reached: bool = True,
    ) -> None:
        super().__init__(message)
        self.status, self.retry_after_seconds = status, retry_after_seconds
        self.param, self.code, self.reached = param, code, reached

    @property
    def reason(self) -> str:
        """The kind of fault in two words, to count by."""
        if not self.status:
            return "no connection"
        return f"HTTP {self.status}" if self.status >= 400 else "unreadable answer"


@dataclass(frozen=True)
class Completion:
    """A whole answer and what it took; counts are 0 where the endpoint gives none."""

    text: str
    input_tokens: int = 0
    output_tokens: int = 0


@dataclass(frozen=True)
class AnswerPiece:
    """New text of an answer; the last pieces carry `finish_reason` and `usage` (token counts), and `extensions`, this
    project's own fields, where they were asked for."""

    text: str = ""
    finish_reason: str | None = None
    usage: dict[str, int] | None = None
    extensions: dict[str, Any] | None = None


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
    """Talks to the API at `url`, for example ``http://127.0.0.1:8000``.

    Args:
        url: the server's address, or that of its API (``https://HOST/v1``), which anything behind the host stands for.
        api_key: sent as a bearer token; empty for none. It shows in no message.
        timeout_seconds: the longest silence within an answer.
        tls: certificates for ``https``; None for those of this machine.
    """

    def __init__(
        self,
        url: str,
        api_key: str = "",
        timeout_seconds: float = READ_TIMEOUT_SECONDS,
        tls: ssl.SSLContext | None = None,
    ) -> None:
        url = url.rstrip("/")
        self.api_url = url if urlsplit(url).path else f"{url}/v1"
        self.url = self.api_url.removesuffix("/v1")
        self._api_key, self._timeout_seconds, self._tls = api_key, timeout_seconds, tls
        self._opened: httpx.AsyncClient | None = None

    async def open(self) -> None:
        """Keep connections from now on, until `close`, for many requests from one event loop."""
        self._opened = self._new_http()

    async def close(self) -> None:
        """Close the connections that are kept."""
        http, self._opened = self._opened, None
        if http is not None:
            await http.aclose()

    async def model(self) -> dict[str, Any]:
        """Id, revision and context length of the model that is asked by default.

        Raises:
            EndpointError: if nothing answers there.
        """
        return (await self.models())[0]

    async def models(self) -> list[dict[str, Any]]:
        """All served models, at least one, each with its id and, where the server tells them, more.

        Raises:
            EndpointError: if nothing answers there.
        """
        async with self._http() as http:
            response = await _sent(http, "GET", f"{self.api_url}/models")
            content = self._content(response)
        models = content.get("data")
        if models == []:
            raise EndpointError(f"{self.url} serves no model yet.", response.status_code)
        if not isinstance(models, list) or not all(isinstance(each, dict) for each in models):
            raise _unreadable(response)
        return models

    async def check_readiness(self) -> None:
        """Return if the endpoint takes requests now.

        Raises:
            EndpointError: if it does not.
        """
        async with self._http() as http:
            self._content(await _sent(http, "GET", f"{self.url}/readyz", timeout=READINESS_TIMEOUT_SECONDS))

    async def answer(self, messages: Sequence[dict[str, Any]], **options: Any) -> str:
        """The whole answer to `messages`; see `complete`."""
        return (await self.complete(messages, **options)).text

    async def complete(self, messages: Sequence[dict[str, Any]], **options: Any) -> Completion:
        """The whole answer to `messages`, with its token counts; `options` as in the API.

        Raises:
            EndpointError: if the request is refused or fails, or there is no answer in what comes.
        """
        async with self._http() as http:
            response = await _sent(
                http, "POST", f"{self.api_url}/chat/completions", json={"messages": list(messages), **options}
            )
        content = self._content(response)
        try:
            text = content["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):
            text = None
        if not isinstance(text, str):
            raise _unreadable(response)
        usage = content.get("usage")
        counts = [usage.get(name) if isinstance(usage, dict) else 0 for name in ("prompt_tokens", "completion_tokens")]
        # JSON can name half of a surrogate pair, which no file can hold.
        text = text.encode("utf-8", "replace").decode()
        return Completion(text, *(count if isinstance(count, int) else 0 for count in counts))

    async def stream(self, messages: Sequence[dict[str, Any]], **options: Any) -> AsyncGenerator[AnswerPiece, None]:
        """The answer piece by piece; closing the generator cancels it at the server.

        Raises:
            EndpointError: if the request is refused or fails on the way.
        """
        body = {"messages": list(messages), "stream": True, "stream_options": {"include_usage": True}, **options}
        async with aclosing(self.chunks("/chat/completions", body)) as chunks:
            async for chunk in chunks:
                yield _piece(chunk)

    async def chunks(self, path: str, body: dict[str, Any]) -> AsyncGenerator[dict[str, Any], None]:
        """The JSON of each event that the API's `path` streams; closing the generator closes the connection.

        Raises:
            EndpointError: if the request is refused or fails on the way.
        """
        import httpx

        async with self._http() as http:
            try:
                async with http.stream("POST", f"{self.api_url}{path}", json=body) as response:
                    if response.is_error:
                        await response.aread()
                        self._content(response)
                    async for line in response.aiter_lines():
                        field, _, data = line.partition(":")
                        data = data.strip()
                        if field != "data":
                            continue
                        if data == "[DONE]":
                            return
                        try:
                            chunk = json.loads(data)
                        except ValueError:
                            raise EndpointError(f"{self.url} streams something else than JSON.") from None
                        if "error" in chunk:
                            raise self._fault(chunk, response.status_code)
                        yield chunk
            except httpx.HTTPError as error:
                raise _unreachable(self.url, error) from None
        raise EndpointError(f"{self.url} ended the connection in the middle of the answer.")

    async def ask(self, method: str, url: str, **options: Any) -> dict[str, Any]:
        """The JSON object that `url` answers with; `options` as httpx takes them.

        Raises:
            EndpointError: if nothing answers there, it refuses, or answers with something else.
        """
        async with self._http() as http:
            return self._content(await _sent(http, method, url, **options))

    @asynccontextmanager
    async def _http(self) -> AsyncIterator[httpx.AsyncClient]:
        if self._opened is not None:
            yield self._opened
            return
        async with self._new_http() as http:
            yield http

    def _new_http(self) -> httpx.AsyncClient:
        import httpx

        host = urlsplit(self.url).hostname or ""
        return httpx.AsyncClient(
            headers={"Authorization": f"Bearer {self._api_key}"} if self._api_key else {},
            verify=self._tls or True,
            timeout=httpx.Timeout(self._timeout_seconds, connect=CONNECT_TIMEOUT_SECONDS),
            # Who asks bounds how many requests are under way.
            limits=httpx.Limits(max_connections=None),
            # A proxy from the environment cannot reach this machine's own addresses.
            trust_env=host not in ("localhost", "::1") and not host.startswith("127."),
        )

    def _content(self, response: httpx.Response) -> dict[str, Any]:
        try:
            content = response.json()
        except (ValueError, RecursionError):
            content = None
        wait = _retry_after(response.headers.get("retry-after", ""))
        if not isinstance(content, dict):
            raise EndpointError(
                f"{response.url} answered with HTTP {response.status_code} and no JSON; is it the address of this API?",
                response.status_code,
                wait,
            )
        if response.is_error:
            raise self._fault(content, response.status_code, wait)
        return content

    def _fault(self, content: dict[str, Any], status: int, wait: float | None = None) -> EndpointError:
        error = content.get("error")
        details = error if isinstance(error, dict) else {}
        message = str(details.get("message") if details else content)
        # Some servers repeat the key that they refuse.
        message = message.replace(self._api_key, "***") if self._api_key else message
        param, code = (each if isinstance(each, str) else None for each in (details.get("param"), details.get("code")))
        return EndpointError(f"the endpoint says: {message}", status, wait, param=param, code=code)


async def _sent(http: httpx.AsyncClient, method: str, url: str, **options: Any) -> httpx.Response:
    import httpx

    try:
        return await http.request(method, url, **options)
    except httpx.HTTPError as error:
        raise _unreachable(url, error) from None


def _unreadable(response: httpx.Response) -> EndpointError:
    return EndpointError(f"{response.url} answered with JSON that is not what the API says.", response.status_code)


def _retry_after(header: str) -> float | None:
    """Seconds from a ``Retry-After`` header, which is a number of them or a date."""
    if header.replace(".", "", 1).isdigit():
        return float(header)
    try:
        return max(0.0, parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None


def _piece(chunk: dict[str, Any]) -> AnswerPiece:
    if not chunk["choices"]:
        return AnswerPiece(usage=chunk.get("usage"))
    choice = chunk["choices"][0]
    text = choice["delta"].get("content") or ""
    return AnswerPiece(text, choice.get("finish_reason"), chunk.get("usage"), choice.get("shellv"))


def _unreachable(url: str, error: Exception) -> EndpointError:
    import httpx

    reason = str(error) or type(error).__name__
    if isinstance(error, httpx.ConnectError | httpx.ConnectTimeout):
        message = f"{url} does not answer ({reason}). Start it with: shellv serve --model MODEL"
        return EndpointError(message, reached=False)
    return EndpointError(f"{url} broke off ({reason}).")
