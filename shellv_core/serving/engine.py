"""What the HTTP layer, and every other caller, knows of an engine: requests in, a stream of tokens out.

Knows nothing of HTTP and imports neither torch nor a web library. `transformers_engine` implements `Engine` in
process.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal, Protocol

from shellv_core.errors import ServingError

if TYPE_CHECKING:
    from PIL import Image

FinishReason = Literal["stop", "length"]
Role = Literal["system", "user", "assistant"]


class RequestError(ServingError):
    """The request itself cannot be served; sending it again changes nothing.

    Args:
        message: what is wrong, what was received and what is allowed.
        param: the request's field at fault, as a path like ``messages[0].content[1]``.
        code: a word for programs, for example ``context_length_exceeded``.
    """

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class QueueFullError(ServingError):
    """Too many requests wait already.

    Args:
        retry_after_seconds: when a place is likely to be free, in whole seconds.
    """

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EngineStoppedError(ServingError):
    """The engine is shutting down or has died; another replica may answer."""


class GenerationError(ServingError):
    """The model failed while it answered."""


@dataclass(frozen=True)
class TextPart:
    """Literal text: nothing in it is read as a special token or as an image slot."""

    text: str


@dataclass(frozen=True)
class ImagePart:
    """A decoded RGB picture."""

    image: Image.Image


@dataclass(frozen=True)
class Message:
    """One turn of a conversation."""

    role: Role
    parts: tuple[TextPart | ImagePart, ...]


@dataclass(frozen=True)
class GenerationRequest:
    """A conversation to continue.

    Attributes:
        max_tokens: the longest answer in tokens; None for the engine's default, cut to what fits the context.
        temperature: 0 is greedy decoding; otherwise logits are divided by it before sampling.
        top_p: sample among the most likely tokens that hold this share of the probability, in (0, 1].
        seed: makes a sampled answer repeatable on the same engine; None draws one.
        stop: the answer ends before the first of these strings.
    """

    messages: tuple[Message, ...]
    max_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """A step of an answer.

    The first event of every answer comes when the request was accepted: no text yet, `prompt_tokens` known. The last
    one carries `finish_reason`.

    Attributes:
        text: text that is new since the last event; empty while a character or a stop string is incomplete.
        prompt_tokens: tokens of the prompt, those of the pictures included.
        completion_tokens: tokens generated up to here, the end-of-sequence token included.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class EngineHealth:
    """`alive`: the engine's thread makes progress; `ready`: it accepts requests now; `reason`: why it does not."""

    alive: bool
    ready: bool
    reason: str = ""


@dataclass(frozen=True)
class EngineStats:
    """Counters since the start, and the requests of this moment."""

    running: int
    waiting: int
    finished: int
    cancelled: int
    rejected: int
    failed: int


class Engine(Protocol):
    """A model that continues conversations."""

    context_length: int

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Stream the answer; closing the generator early cancels the request and frees its place.

        Raises (before the first event):
            RequestError: if the conversation is too long, or not one that the model's chat template takes.
            QueueFullError: if too many requests wait.
            EngineStoppedError: if the engine takes no more work.

        Raises (at any later step):
            GenerationError: if the model failed.
            EngineStoppedError: if the engine stopped before the answer's end.
        """
        ...

    def health(self) -> EngineHealth:
        """Whether the engine lives and takes requests."""
        ...

    def stats(self) -> EngineStats:
        """Counters for monitoring."""
        ...

    async def drain(self, deadline_seconds: float) -> None:
        """Take no more work, let what runs finish, and after the deadline fail the rest."""
        ...
