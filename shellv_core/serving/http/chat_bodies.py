"""Bodies of ``POST /v1/chat/completions``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Discriminator, Field, Tag

from shellv_core.serving.http.bodies import (
    Body,
    ChoiceExtensions,
    FinishReason,
    SamplingBody,
    Text,
    Usage,
    one_or_list,
)


class TextContent(Body):
    """Literal text."""

    type: Literal["text"]
    text: Text


class ImageUrl(Body):
    """A picture as ``data:image/png;base64,...`` (png, jpeg, webp or gif), or, where its host is allowed, https."""

    url: Text
    detail: Literal["auto"] = "auto"


class ImageContent(Body):
    """A picture; allowed in user messages."""

    type: Literal["image_url"]
    image_url: ImageUrl


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class ChatMessage(Body):
    """One turn."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[
        Annotated[Text, Tag("one")] | Annotated[list[Content], Field(min_length=1, max_length=64), Tag("list")],
        Discriminator(one_or_list),
    ]


Messages = Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]


class ChatRequest(SamplingBody):
    """A conversation to continue."""

    messages: Messages
    max_completion_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = Field(
        None, description="The newer name of max_tokens."
    )
    logprobs: bool | None = Field(None, description="Report each token's log-probability.")
    top_logprobs: Annotated[int, Field(ge=0, le=20)] | None = Field(
        None, description="Report this many likely tokens beside each; needs logprobs."
    )


class Chance(BaseModel):
    """A token that could come, its UTF-8 bytes and its log-probability."""

    token: str
    bytes: list[int]
    logprob: float


class TokenChances(Chance):
    """The token that did come, and the most likely ones."""

    top_logprobs: list[Chance]


class ChatLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens."""

    content: list[TokenChances]
    refusal: None = None


class AnswerMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"]
    content: str


class ChatChoice(BaseModel):
    """An answer and why it ended."""

    index: int
    message: AnswerMessage
    finish_reason: FinishReason
    logprobs: ChatLogprobs | None
    shellv: ChoiceExtensions | None = None


class ChatCompletion(BaseModel):
    """Whole answers."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChatChunkChoice(BaseModel):
    """A piece of an answer."""

    index: int
    delta: Delta
    finish_reason: FinishReason | None
    logprobs: ChatLogprobs | None = None
    shellv: ChoiceExtensions | None = None


class ChatCompletionChunk(BaseModel):
    """A streamed piece of an answer."""

    id: str
    object: Literal["chat.completion.chunk"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChunkChoice]
    usage: Usage | None = None
