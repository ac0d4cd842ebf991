"""Requests and answers of an engine in the words of an OpenAI-compatible server.

Servers differ in what they add to OpenAI's API; which one it is, its list of models says (``owned_by``).
"""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass
from typing import Any

from shellv_core.endpoint.client import EndpointError
from shellv_core.errors import ServingError
from shellv_core.serving.engine import (
    EngineStoppedError,
    GenerationError,
    GenerationRequest,
    ImagePart,
    Message,
    QueueFullError,
    QueueTimeoutError,
    RequestError,
    TextPart,
    TokenChance,
    TokenEvent,
    TokenLogprob,
)

Json = dict[str, Any]

UNKNOWN_TOKEN = -1
"""Stands for the id of a token whose server tells only its text."""
DEFAULT_RETRY_SECONDS = 5


class ConnectionLostError(EngineStoppedError):
    """The server went while it had the request; whether the request brought it down, nobody knows."""


@dataclass(frozen=True)
class Dialect:
    """What a server takes beside OpenAI's fields.

    Attributes:
        sampling: top-k, min-p, repetition penalty and least length, and token counts in every chunk, as vLLM spells
            them.
        token_ids: the fields that make it give token ids.
    """

    sampling: bool
    token_ids: Json


OWNER = "shellv"
"""How this project's own servers name themselves as ``owned_by``."""
DIALECTS = {
    OWNER: Dialect(True, {"shellv": {"return_token_ids": True}}),
    "vllm": Dialect(True, {"return_token_ids": True}),
}
PLAIN = Dialect(False, {})


def request_body(request: GenerationRequest, model: str, dialect: Dialect) -> tuple[str, Json]:
    """Path below the API's root and body that ask for one streamed answer; encodes pictures.

    Raises:
        RequestError: if the server knows no word for something in it.
    """
    usage = {"include_usage": True, **({"continuous_usage_stats": True} if dialect.sampling else {})}
    body: Json = {
        "model": model,
        "stream": True,
        "stream_options": usage,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "frequency_penalty": request.frequency_penalty,
        "presence_penalty": request.presence_penalty,
        **_sampling(request, dialect),
        **dialect.token_ids,
    }
    if request.max_tokens is not None:
        body["max_tokens"] = request.max_tokens
    if request.logit_bias:
        body["logit_bias"] = {str(token_id): bias for token_id, bias in request.logit_bias.items()}
    if request.seed is not None:
        body["seed"] = request.seed
    if request.stop:
        body["stop"] = list(request.stop)
    if request.messages[0].role == "text":
        body["prompt"] = _text(request.messages[0])
        if request.logprobs:
            body["logprobs"] = request.top_logprobs
        return "/completions", body
    body["messages"] = [message_body(message) for message in request.messages]
    if request.logprobs:
        body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
    return "/chat/completions", body


def message_body(message: Message) -> Json:
    """A turn; pictures go as PNG, which loses nothing."""
    if all(isinstance(part, TextPart) for part in message.parts):
        return {"role": message.role, "content": _text(message)}
    return {"role": message.role, "content": [_part(part) for part in message.parts]}


def _sampling(request: GenerationRequest, dialect: Dialect) -> Json:
    """Fields that OpenAI has no name for; a server with defaults of its own is told all of them."""
    values: dict[str, tuple[Any, Any]] = {
        "top_k": (request.top_k, 0),
        "min_p": (request.min_p, 0.0),
        "repetition_penalty": (request.repetition_penalty, 1.0),
        "min_tokens": (request.min_tokens, 0),
    }
    if dialect.sampling:
        return {name: value for name, (value, _) in values.items()}
    for name, (value, neutral) in values.items():
        if value != neutral:
            raise RequestError(f"{name} is not supported by this model's server.", name, "unsupported_parameter")
    return {}


def _text(message: Message) -> str:
    return "".join(part.text for part in message.parts if isinstance(part, TextPart))


def _part(part: TextPart | ImagePart) -> Json:
    if isinstance(part, TextPart):
        return {"type": "text", "text": part.text}
    buffer = io.BytesIO()
    part.image.save(buffer, "PNG", compress_level=1)
    url = f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


class AnswerReader:
    """Turns the chunks of one streamed answer into an engine's events; the end is `last`."""

    def __init__(self) -> None:
        self.prompt_tokens = self.completion_tokens = 0
        self._finish_reason: str | None = None
        self._begun = False

    def events(self, chunk: Json) -> list[TokenEvent]:
        """The events that `chunk` stands for.

        Raises:
            GenerationError: if it is not what the API says.
        """
        try:
            return self._events(chunk)
        except (KeyError, IndexError, TypeError, AttributeError):
            raise GenerationError("the model's server streams something else than its API says.") from None

    def last(self) -> TokenEvent:
        """The event that ends the answer.

        Raises:
            GenerationError: if the server gave no reason for the end, or one that is no answer's.
        """
        if self._finish_reason == "stop":
            return TokenEvent("", self.prompt_tokens, self.completion_tokens, "stop")
        if self._finish_reason == "length":
            return TokenEvent("", self.prompt_tokens, self.completion_tokens, "length")
        raise GenerationError(f"the model's server ended the answer with {self._finish_reason!r}.")

    def _events(self, chunk: Json) -> list[TokenEvent]:
        events = []
        usage = chunk.get("usage")
        counted = self.completion_tokens
        if usage:
            self.prompt_tokens, counted = int(usage["prompt_tokens"]), int(usage["completion_tokens"])
        if not self._begun:
            self._begun = True
            events.append(TokenEvent("", self.prompt_tokens, 0))
        for choice in chunk["choices"]:
            self._finish_reason = choice.get("finish_reason") or self._finish_reason
            text = choice["delta"].get("content") if "delta" in choice else choice.get("text")
            token_ids = tuple((choice.get("shellv") or choice).get("token_ids") or ())
            logprobs = _logprobs(choice.get("logprobs") or {}, token_ids)
            if text or token_ids or logprobs:
                if not usage:
                    counted += len(token_ids) or len(logprobs) or 1
                events.append(TokenEvent(text or "", self.prompt_tokens, counted, None, token_ids, logprobs))
        self.completion_tokens = counted
        return events


def _logprobs(found: Json, token_ids: tuple[int, ...]) -> tuple[TokenLogprob, ...]:
    """Log-probabilities as chat completions or plain completions tell them."""
    chances: list[tuple[TokenChance, list[TokenChance]]] = []
    for each in found.get("content") or ():
        chances.append((_chance(each), [_chance(top) for top in each.get("top_logprobs") or ()]))
    tops = found.get("top_logprobs") or []
    for index, token in enumerate(found.get("tokens") or ()):
        top = (
            [_chance({"token": name, "logprob": value}) for name, value in (tops[index] or {}).items()] if tops else []
        )
        chances.append((_chance({"token": token, "logprob": found["token_logprobs"][index]}), top))
    ids = token_ids if len(token_ids) == len(chances) else (UNKNOWN_TOKEN,) * len(chances)
    return tuple(
        TokenLogprob(token_id, chance.token, chance.bytes, chance.logprob, tuple(top))
        for token_id, (chance, top) in zip(ids, chances, strict=True)
    )


def _chance(found: Json) -> TokenChance:
    token = str(found["token"])
    as_bytes = found.get("bytes")
    return TokenChance(
        UNKNOWN_TOKEN, token, token.encode() if as_bytes is None else bytes(as_bytes), float(found["logprob"])
    )


def engine_error(error: EndpointError) -> ServingError:
    """What an engine raises where a server answered with `error`."""
    status, text = error.status, str(error).removeprefix("the endpoint says: ")
    wait = round(error.retry_after_seconds or DEFAULT_RETRY_SECONDS)
    if not status:
        return EngineStoppedError(text) if not error.reached else ConnectionLostError(text)
    if status in (401, 403):
        return GenerationError("the model's server refuses the gateway's key.")
    if status == 429:
        return QueueFullError(text, wait)
    if 400 <= status < 500:
        return RequestError(text, error.param, error.code)
    if error.code == "queue_timeout":
        return QueueTimeoutError(text, wait)
    if status == 503 or error.code == "shutting_down":
        return EngineStoppedError(text)
    return GenerationError(text)
