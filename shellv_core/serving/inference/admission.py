"""What a request may ask of a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from shellv_core.config import nearest
from shellv_core.serving.engine import GenerationRequest, RequestError


def context_length_of(model: Any, tokenizer: Any) -> int:
    """Tokens of prompt and answer together that the model takes."""
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Tokenizers without a limit of their own report an astronomic one.
    return int(min(positions or tokenizer.model_max_length, tokenizer.model_max_length))


def end_ids_of(model: Any, tokenizer: Any) -> frozenset[int]:
    """Tokens that end an answer."""
    found = model.generation_config.eos_token_id
    ids = found if isinstance(found, list) else [found]
    return frozenset(token_id for token_id in [*ids, tokenizer.eos_token_id] if token_id is not None)


def check_request(request: GenerationRequest, adapters: Sequence[str], vocabulary_size: int) -> None:
    """Check what can be told before the prompt is encoded.

    Raises:
        RequestError: if the request names an adapter or a token that is not there, or its lengths contradict.
    """
    if request.adapter is not None and request.adapter not in adapters:
        raise RequestError(
            f"the adapter {request.adapter!r} is not loaded; {nearest(request.adapter, adapters)}",
            "model",
            "model_not_found",
        )
    beyond = [token_id for token_id in request.logit_bias if not 0 <= token_id < vocabulary_size]
    if beyond:
        raise RequestError(
            f"logit_bias names token {beyond[0]}; this model's tokens are 0 to {vocabulary_size - 1}.", "logit_bias"
        )
    if request.max_tokens is not None and request.min_tokens > request.max_tokens:
        raise RequestError(
            f"min_tokens={request.min_tokens} is more than max_tokens={request.max_tokens}.", "min_tokens"
        )


def allowed_tokens(
    request: GenerationRequest, num_prompt_tokens: int, context_length: int, default_max_tokens: int
) -> int:
    """The longest answer in tokens.

    Raises:
        RequestError: if the context does not hold prompt and answer.
    """
    room = context_length - num_prompt_tokens
    wanted = request.max_tokens if request.max_tokens is not None else max(request.min_tokens, 1)
    if wanted > room:
        answer = f" and {wanted} for the answer" if request.max_tokens is not None else ""
        raise RequestError(
            f"this model's context holds {context_length} tokens, but the messages take {num_prompt_tokens}"
            f" (pictures included){answer}; shorten the messages or lower max_tokens.",
            "messages",
            "context_length_exceeded",
        )
    if request.max_tokens is not None:
        return request.max_tokens
    return min(max(default_max_tokens, request.min_tokens), room)
