"""The OpenAI-compatible request and response bodies, and their translation to the engine's terms.

A field that is not listed here is refused, never ignored.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag

from shellv_core.config import Config
from shellv_core.serving.engine import GenerationRequest, ImagePart, Message, RequestError, Role, TextPart
from shellv_core.serving.images import ImageLimits, decode_data_url


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character") from None
    return text


Text = Annotated[str, AfterValidator(_encodable)]
StopString = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_encodable)]


def _one_or_list(value: Any) -> str:
    return "list" if isinstance(value, list) else "one"


class RequestLimits(Config):
    """What one request may ask for."""

    max_text_bytes: int = 256 << 10
    """Of all messages together, in UTF-8."""
    images: ImageLimits = ImageLimits()


class _Body(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class TextContent(_Body):
    """Literal text."""

    type: Literal["text"]
    text: Text


class ImageUrl(_Body):
    """A picture as ``data:image/png;base64,...`` (png, jpeg, webp or gif)."""

    url: str
    detail: Literal["auto"] = "auto"


class ImageContent(_Body):
    """A picture; allowed in user messages."""

    type: Literal["image_url"]
    image_url: ImageUrl


Content = Annotated[TextContent | ImageContent, Field(discriminator="type")]


class ChatMessage(_Body):
    """One turn."""

    role: Role
    content: Annotated[
        Annotated[Text, Tag("one")] | Annotated[list[Content], Field(min_length=1, max_length=64), Tag("list")],
        Discriminator(_one_or_list),
    ]


class StreamOptions(_Body):
    """`include_usage`: send the token counts in a last chunk."""

    include_usage: bool = False


class ChatRequest(_Body):
    """Body of ``POST /v1/chat/completions``."""

    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=256)]
    model: str | None = Field(None, description="A served model's id; left out, the one that is served.")
    max_tokens: Annotated[int, Field(ge=1)] | None = None
    max_completion_tokens: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] | None = Field(
        None, description="0, the default, is greedy decoding."
    )
    top_p: Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[
            Annotated[StopString, Tag("one")] | Annotated[list[StopString], Field(max_length=4), Tag("list")],
            Discriminator(_one_or_list),
        ]
        | None
    ) = None
    n: Literal[1] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class Usage(BaseModel):
    """Token counts of one answer."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class AnswerMessage(BaseModel):
    """The model's turn."""

    role: Literal["assistant"] = "assistant"
    content: str


class Choice(BaseModel):
    """An answer and why it ended."""

    index: Literal[0] = 0
    message: AnswerMessage
    finish_reason: Literal["stop", "length"]
    logprobs: None = None


class ChatCompletion(BaseModel):
    """A whole answer."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    system_fingerprint: str
    choices: list[Choice]
    usage: Usage


class Delta(BaseModel):
    """What a chunk adds to the answer."""

    role: Literal["assistant"] | None = None
    content: str | None = None


class ChunkChoice(BaseModel):
    """A piece of an answer."""

    index: Literal[0] = 0
    delta: Delta
    finish_reason: Literal["stop", "length"] | None = None


class ChatCompletionChunk(BaseModel):
    """A streamed piece of an answer."""

    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChunkChoice]
    usage: Usage | None = None


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
    """Body of ``GET /v1/models``."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class ErrorDetail(BaseModel):
    """What went wrong; `param` is the path of the field at fault, `code` a word for programs."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorResponse(BaseModel):
    """Body of every response that is not a success."""

    error: ErrorDetail


def error_body(message: str, kind: str, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    """An OpenAI error body."""
    # Both may quote a client's words, which need not be encodable.
    message = message.encode(errors="replace").decode()
    param = param and param.encode(errors="replace").decode()
    return ErrorResponse(error=ErrorDetail(message=message, type=kind, param=param, code=code)).model_dump()


def to_generation_request(body: ChatRequest, limits: RequestLimits) -> GenerationRequest:
    """Check and decode what a schema cannot: sizes, pictures, the order of turns.

    Raises:
        RequestError: naming the field at fault.
    """
    if body.max_tokens is not None and body.max_completion_tokens is not None:
        raise RequestError("give max_tokens or max_completion_tokens, not both.", "max_tokens")
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only allowed with stream=true.", "stream_options")
    if body.messages[-1].role != "user":
        raise RequestError(
            f"the last message must be the user's; it is the {body.messages[-1].role}'s.",
            f"messages[{len(body.messages) - 1}].role",
        )
    _check_sizes(body.messages, limits)
    max_tokens = body.max_completion_tokens if body.max_tokens is None else body.max_tokens
    stop = [body.stop] if isinstance(body.stop, str) else body.stop or []
    return GenerationRequest(
        messages=tuple(
            _message(message, f"messages[{index}]", limits.images) for index, message in enumerate(body.messages)
        ),
        max_tokens=max_tokens,
        temperature=body.temperature if body.temperature is not None else 0.0,
        top_p=body.top_p if body.top_p is not None else 1.0,
        seed=body.seed,
        stop=tuple(stop),
    )


def _check_sizes(messages: list[ChatMessage], limits: RequestLimits) -> None:
    parts: list[str | TextContent | ImageContent] = []
    for message in messages:
        parts += [message.content] if isinstance(message.content, str) else message.content
    texts = [part if isinstance(part, str) else part.text for part in parts if not isinstance(part, ImageContent)]
    num_bytes, num_images = sum(len(text.encode()) for text in texts), len(parts) - len(texts)
    if num_bytes > limits.max_text_bytes:
        raise RequestError(
            f"the messages hold {num_bytes} bytes of text; {limits.max_text_bytes} are allowed.",
            "messages",
            "text_too_long",
        )
    if num_images > limits.images.max_images:
        raise RequestError(
            f"the messages hold {num_images} pictures; {limits.images.max_images} are allowed.",
            "messages",
            "too_many_images",
        )


def _message(message: ChatMessage, param: str, limits: ImageLimits) -> Message:
    if isinstance(message.content, str):
        return Message(message.role, (TextPart(message.content),))
    parts: list[TextPart | ImagePart] = []
    for index, part in enumerate(message.content):
        if isinstance(part, TextContent):
            parts.append(TextPart(part.text))
            continue
        where = f"{param}.content[{index}]"
        if message.role != "user":
            raise RequestError(f"pictures belong into user messages, not into the {message.role}'s.", where)
        parts.append(ImagePart(decode_data_url(part.image_url.url, limits, f"{where}.image_url.url")))
    return Message(message.role, tuple(parts))
