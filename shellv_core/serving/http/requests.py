"""Request bodies in the engine's terms, with what a schema cannot check: sizes, pictures, the order of turns."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from shellv_core.serving.engine import GenerationRequest, ImagePart, Message, RequestError, TextPart
from shellv_core.serving.http.bodies import SamplingBody
from shellv_core.serving.http.chat_bodies import ChatMessage, ChatRequest, ImageContent, TextContent
from shellv_core.serving.http.completion_bodies import CompletionRequest
from shellv_core.serving.http.config import RequestLimits
from shellv_core.serving.image_decoder import ImageDecoder, PixelLease
from shellv_core.serving.images import parse_data_url
from shellv_core.serving.remote_images import RemoteImages


@dataclass(frozen=True)
class Reader:
    """Turns bodies into the engine's requests.

    Attributes:
        limits: what one request may ask for.
        decoder: where pictures are decoded.
        remote: where pictures of other hosts come from.
    """

    limits: RequestLimits
    decoder: ImageDecoder
    remote: RemoteImages

    async def chat(self, body: ChatRequest, adapter: str | None, lease: PixelLease) -> GenerationRequest:
        """The conversation that `body` wants continued.

        Raises:
            RequestError: naming the field at fault.
            QueueFullError: if the server holds too many pixels already.
        """
        if body.max_tokens is not None and body.max_completion_tokens is not None:
            raise RequestError("give max_tokens or max_completion_tokens, not both.", "max_tokens")
        if body.top_logprobs and not body.logprobs:
            raise RequestError("top_logprobs is only allowed with logprobs=true.", "top_logprobs")
        sampling = _sampling(body, body.max_completion_tokens if body.max_tokens is None else body.max_tokens)
        if body.messages[-1].role != "user":
            raise RequestError(
                f"the last message must be the user's; it is the {body.messages[-1].role}'s.",
                f"messages[{len(body.messages) - 1}].role",
            )
        return GenerationRequest(
            messages=await self.messages(body.messages, lease),
            adapter=adapter,
            logprobs=bool(body.logprobs),
            top_logprobs=body.top_logprobs or 0,
            **sampling,
        )

    def completion(self, body: CompletionRequest, adapter: str | None) -> GenerationRequest:
        """The text that `body` wants continued.

        Raises:
            RequestError: naming the field at fault.
        """
        sampling = _sampling(body, body.max_tokens)
        return GenerationRequest(
            messages=self.text(body.prompt),
            adapter=adapter,
            logprobs=body.logprobs is not None,
            top_logprobs=body.logprobs or 0,
            **sampling,
        )

    def text(self, prompt: str) -> tuple[Message, ...]:
        """A text that is continued as it is."""
        self._check_text(len(prompt.encode()), "prompt")
        return (Message("text", (TextPart(prompt),)),)

    async def messages(self, messages: Sequence[ChatMessage], lease: PixelLease) -> tuple[Message, ...]:
        """A conversation with its pictures decoded.

        Raises:
            RequestError: naming the message at fault.
            QueueFullError: if the server holds too many pixels already.
        """
        self._check_sizes(messages)
        return tuple(
            [await self._message(message, f"messages[{index}]", lease) for index, message in enumerate(messages)]
        )

    def _check_sizes(self, messages: Sequence[ChatMessage]) -> None:
        parts: list[str | TextContent | ImageContent] = []
        for message in messages:
            parts += [message.content] if isinstance(message.content, str) else message.content
        texts = [part if isinstance(part, str) else part.text for part in parts if not isinstance(part, ImageContent)]
        self._check_text(sum(len(text.encode()) for text in texts), "messages")
        num_images = len(parts) - len(texts)
        if num_images > self.limits.images.max_images:
            raise RequestError(
                f"the messages hold {num_images} pictures; {self.limits.images.max_images} are allowed.",
                "messages",
                "too_many_images",
            )

    def _check_text(self, num_bytes: int, param: str) -> None:
        if num_bytes > self.limits.max_text_bytes:
            raise RequestError(
                f"the {param} hold {num_bytes} bytes of text; {self.limits.max_text_bytes} are allowed.",
                param,
                "text_too_long",
            )

    async def _message(self, message: ChatMessage, param: str, lease: PixelLease) -> Message:
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
            parts.append(await self._picture(part.image_url.url, f"{where}.image_url.url", lease))
        return Message(message.role, tuple(parts))

    async def _picture(self, url: str, param: str, lease: PixelLease) -> ImagePart:
        loop = asyncio.get_running_loop()
        threads = self.decoder.threads
        if url[:6].lower() in ("http:/", "https:"):
            data, image_format = await self.remote.fetch(url, param)
        else:
            data, image_format = await loop.run_in_executor(threads, parse_data_url, url, self.limits.images, param)
        return ImagePart(await loop.run_in_executor(threads, self.decoder.decode, data, image_format, param, lease))


def _sampling(body: SamplingBody, max_tokens: int | None) -> dict[str, Any]:
    """The fields of a `GenerationRequest` that a body of either kind sets."""
    if body.stream_options is not None and not body.stream:
        raise RequestError("stream_options is only allowed with stream=true.", "stream_options")
    if max_tokens is not None and (body.min_tokens or 0) > max_tokens:
        raise RequestError(f"min_tokens is {body.min_tokens}, but max_tokens {max_tokens}.", "min_tokens")
    given = {
        "max_tokens": max_tokens,
        "min_tokens": body.min_tokens,
        "temperature": body.temperature,
        "top_p": body.top_p,
        "top_k": None if body.top_k == -1 else body.top_k,
        "min_p": body.min_p,
        "repetition_penalty": body.repetition_penalty,
        "frequency_penalty": body.frequency_penalty,
        "presence_penalty": body.presence_penalty,
        "logit_bias": None if body.logit_bias is None else {int(key): each for key, each in body.logit_bias.items()},
        "seed": body.seed,
        "stop": (body.stop,) if isinstance(body.stop, str) else body.stop and tuple(body.stop),
    }
    return {name: value for name, value in given.items() if value is not None}
