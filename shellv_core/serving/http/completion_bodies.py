"""Bodies of ``POST /v1/completions``, ``POST /tokenize`` and ``GET /v1/models``."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from shellv_core.serving.http.bodies import Body, ChoiceExtensions, FinishReason, SamplingBody, Text, Usage
from shellv_core.serving.http.chat_bodies import Messages


class CompletionRequest(SamplingBody):
    """A text to continue as it is, without the model's chat template."""

    prompt: Annotated[Text, Field(min_length=1)]
    logprobs: Annotated[int, Field(ge=0, le=5)] | None = Field(
        None, description="Report each token's log-probability, and this many likely tokens beside it."
    )


class CompletionLogprobs(BaseModel):
    """Log-probabilities of an answer's tokens; `text_offset` counts characters from the answer's begin."""

    tokens: list[str]
    token_logprobs: list[float]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class CompletionChoice(BaseModel):
    """A continuation and why it ended, which is null in all pieces of a stream but the last."""

    index: int
    text: str
    finish_reason: FinishReason | None
    logprobs: CompletionLogprobs | None
    shellv: ChoiceExtensions | None = None


class Completion(BaseModel):
    """Whole continuations, or a streamed piece of one."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage | None = None


class TokenizeRequest(Body):
    """A conversation, or a text as it is, whose tokens are counted."""

    model: Text | None = None
    messages: Messages | None = None
    prompt: Annotated[Text, Field(min_length=1)] | None = None


class TokenCount(BaseModel):
    """Tokens that the prompt takes, pictures included, of those that the model's context holds."""

    count: int
    max_model_len: int


class ModelCard(BaseModel):
    """A served model: `id` is an alias, `revision` the SHA-256 of its very weights, `parent` an adapter's base."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "shellv"
    parent: str | None = None
    revision: str
    context_length: int


class ModelList(BaseModel):
    """The models that are served."""

    object: Literal["list"] = "list"
    data: list[ModelCard]
