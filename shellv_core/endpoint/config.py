"""How an endpoint is asked."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from shellv_core.config import Config


class EndpointAccess(Config):
    """How any server of the OpenAI chat protocol is asked. The key is read from the environment, never from a file."""

    without_effect: ClassVar[frozenset[str]] = frozenset(
        {
            "api_key_variable", "cache_path", "concurrency", "requests_per_minute", "max_retries", "retry_seconds",
            "timeout_seconds", "question_seconds", "total_seconds", "input_price", "output_price",
        }
    )  # fmt: skip

    model: str = ""
    api_key_variable: str = "OPENAI_API_KEY"  # environment variable that holds the key; empty where none is asked for
    cache_path: str = ""  # folder of answers by content hash; empty keeps none
    concurrency: int = Field(default=8, ge=1)
    requests_per_minute: float = Field(default=500.0, gt=0.0)
    max_retries: int = Field(default=4, ge=0)  # after the first attempt; no 4xx but 408, 409, 429 is tried again
    retry_seconds: float = Field(default=1.0, ge=0.0)  # first pause; it doubles, and Retry-After overrides it
    timeout_seconds: float = Field(default=60.0, gt=0.0)  # of one attempt
    question_seconds: float = Field(default=300.0, gt=0.0)  # of all attempts at one question
    total_seconds: float | None = Field(default=None, gt=0.0)  # of all questions, from the first on; null for no bound
    body: dict[str, Any] = {}  # further fields of each request; null leaves one out, such as max_tokens
    input_price: float = Field(default=0.0, ge=0.0)  # per million tokens, in any currency
    output_price: float = Field(default=0.0, ge=0.0)


class EndpointConfig(EndpointAccess):
    """An endpoint and what it is to answer with."""

    base_url: str = "https://api.openai.com/v1"
    max_tokens: int = Field(default=512, ge=1)
    temperature: float = Field(default=0.7, ge=0.0)
