"""What the HTTP layer, and every other caller, knows of an engine: requests in, a stream of tokens out.

Knows nothing of HTTP and imports neither torch nor a web library. `transformers_engine` implements `Engine` in
process.

A request is one answer: whoever wants several of one prompt sends as many requests (with seeds of their own), and the
engine computes prompt and pictures once.
"""

from __future__ import annotations

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, Protocol

from shellv_core.errors import ServingError

if TYPE_CHECKING:
    from PIL import Image

FinishReason = Literal["stop", "length"]
Role = Literal["system", "user", "assistant", "text"]


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


class QueueTimeoutError(ServingError):
    """The request waited for its turn longer than the engine lets requests wait; nothing of it was computed.

    Args:
        retry_after_seconds: when a place is likely to be free, in whole seconds.
    """

    def __init__(self, message: str, retry_after_seconds: int) -> None:
        super().__init__(message)
        self.retry_after_seconds = retry_after_seconds


class EngineStoppedError(ServingError):
    """The engine is shutting down or has died; another replica may answer."""

    code = "shutting_down"


class NotReadyError(EngineStoppedError):
    """The model is not loaded, or no server of it answers now; in a while it may be."""

    code = "not_ready"


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
    """One turn of a conversation; or, alone and in the role ``text``, a text that is continued as it is, without the
    model's chat template."""

    role: Role
    parts: tuple[TextPart | ImagePart, ...]


@dataclass(frozen=True)
class GenerationRequest:
    """A conversation to continue.

    Logits pass the repetition penalty, the frequency and presence penalties, the bias, and then, unless decoding is
    greedy, temperature, top-k, top-p and min-p, in this order.

    Attributes:
        adapter: the adapter that answers, one of `Engine.adapters`; None for the base model.
        max_tokens: the longest answer in tokens; None for the engine's default, cut to what fits the context.
        min_tokens: before this many tokens neither the end-of-text token nor a stop string ends the answer; equal to
            `max_tokens` it makes the length exact.
        temperature: 0 is greedy decoding; otherwise logits are divided by it before sampling.
        top_p: sample among the most likely tokens that hold this share of the probability, in (0, 1].
        top_k: sample among this many most likely tokens; 0 for all.
        min_p: sample among tokens at least this share, in [0, 1], as likely as the most likely one.
        repetition_penalty: > 0; positive logits of tokens in prompt or answer are divided by it, negative multiplied.
        frequency_penalty: taken off a token's logit once for each time that it is in the answer.
        presence_penalty: taken off the logits of all tokens that are in the answer.
        logit_bias: added to the logits of these token ids.
        logprobs: report each token's log-probability under the model itself (before penalties, bias and temperature).
        top_logprobs: report this many most likely tokens beside it; needs `logprobs`.
        seed: makes a sampled answer repeatable on the same engine; None draws one.
        stop: the answer ends before the first of these strings.
    """

    messages: tuple[Message, ...]
    adapter: str | None = None
    max_tokens: int | None = None
    min_tokens: int = 0
    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    frequency_penalty: float = 0.0
    presence_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    logprobs: bool = False
    top_logprobs: int = 0
    seed: int | None = None
    stop: tuple[str, ...] = ()


@dataclass(frozen=True)
class TokenChance:
    """A token that could come, and how likely it was.

    Attributes:
        token: its text alone; U+FFFD stands for bytes that are no whole character.
        bytes: what it adds to the answer in UTF-8, which may be a part of a character; empty for a special token.
        logprob: natural logarithm of its probability.
    """

    token_id: int
    token: str
    bytes: bytes
    logprob: float


@dataclass(frozen=True)
class TokenLogprob(TokenChance):
    """The token that did come; `top` holds the most likely ones, most likely first."""

    top: tuple[TokenChance, ...] = ()


@dataclass(frozen=True)
class TokenEvent:
    """A step of an answer.

    The first event of every answer comes when the request's turn has come: no token yet, `prompt_tokens` known. The
    last one carries `finish_reason`.

    Attributes:
        text: text that is new since the last event; empty while a character or a stop string is incomplete.
        prompt_tokens: tokens of the prompt, those of the pictures included.
        completion_tokens: tokens generated up to here, the end-of-sequence token included.
        token_ids: tokens that are new since the last event, the end-of-sequence token and those of a stop string
            included.
        logprobs: one for each of `token_ids` where the request asked for them, else empty.
    """

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: FinishReason | None = None
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()


@dataclass(frozen=True)
class AdapterInfo:
    """An adapter that requests can name; `revision` is the SHA-256 over its files."""

    name: str
    revision: str


@dataclass(frozen=True)
class EngineHealth:
    """`alive`: the engine's thread makes progress; `ready`: it accepts requests now; `reason`: why it does not."""

    alive: bool
    ready: bool
    reason: str = ""


@dataclass(frozen=True)
class EngineStats:
    """Requests of this moment, and counters since the start.

    Attributes:
        running: requests that have a slot.
        waiting: requests that are being prepared or wait for a slot.
        slots: requests that can run at once now; less than configured after the memory ran out.
        kv_tokens: tokens whose keys and values running requests hold.
        kv_capacity: tokens that the cache's memory may hold.
        finished: answers that came to their end.
        cancelled: requests whose generator was closed early.
        rejected: requests that the full queue refused.
        expired: requests that waited longer than the limit.
        failed: requests that the model failed on.
        prompt_tokens: tokens of all prompts that were run.
        prefix_tokens: those of them that were taken from an earlier request and not computed.
        completion_tokens: tokens generated.
        image_hits, image_misses: pictures whose features were in the cache, and that the vision tower had to see.
        nonfinite: requests that ended because their logits were not finite.
        out_of_memory: steps in which the memory ran out.
        restarts: times that the engine's thread died and was started again.
    """

    running: int
    waiting: int
    slots: int = 1
    kv_tokens: int = 0
    kv_capacity: int = 0
    finished: int = 0
    cancelled: int = 0
    rejected: int = 0
    expired: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    prefix_tokens: int = 0
    completion_tokens: int = 0
    image_hits: int = 0
    image_misses: int = 0
    nonfinite: int = 0
    out_of_memory: int = 0
    restarts: int = 0


class Engine(Protocol):
    """A model that continues conversations."""

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may take together; 0 where nobody tells."""
        ...

    def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """Stream the answer; closing the generator early cancels the request, which has left the model within two
        steps.

        Raises (before the first event):
            RequestError: if the conversation is too long, not one that the model's chat template takes, or names an
                adapter or token that is not there.
            QueueFullError: if too many requests wait.
            QueueTimeoutError: if the request waited too long.
            EngineStoppedError: if the engine takes no more work.

        Raises (at any later step):
            GenerationError: if the model failed.
            EngineStoppedError: if the engine stopped before the answer's end.
        """
        ...

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt that `messages` make, pictures included.

        Raises:
            RequestError: if the model's chat template refuses them.
            EngineStoppedError: if the engine takes no more work.
        """
        ...

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """The adapters that requests can name, beside the base model."""
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
