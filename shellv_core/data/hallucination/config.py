"""Settings of the hallucinated captions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shellv_core.config import Config

RewriteType = Literal["object", "attribute", "relation", "event"]
Share = Annotated[float, Field(ge=0.0, le=1.0)]


class RulesConfig(Config):
    """The offline generator: parsing, word tables, and statistics of the corpus itself."""

    num_fit_captions: int = Field(default=20_000, ge=100)  # captions that the statistics are learnt from
    num_candidates: int = Field(default=48, ge=2)  # rewrites per caption and type between which the choice falls
    num_rounds: int = Field(default=250, ge=0)  # steps of the adversarial balancing; 0 leaves it out
    #: The same over the captions that are rewritten together, where there are more than were learnt from. With 0, or
    #: where all were learnt from, a caption's lies do not depend on the captions beside it.
    num_batch_rounds: int = Field(default=60, ge=0)
    regularization: float = Field(default=1e-5, ge=0.0)  # pull of the balance towards the plain statistics
    batch_size: int = Field(default=256, ge=1)  # captions per parser call
    reparse: bool = True  # parse every lie again, so that the filter sees its grammar; about 4 times the time


class TransformersConfig(Config):
    """A causal language model in a local directory."""

    path: str = ""
    batch_size: int = Field(default=16, ge=1)
    max_new_tokens: int = Field(default=256, ge=16)
    device: str = "cpu"
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"


class EndpointConfig(Config):
    """Any server of the OpenAI chat protocol. The key is read from the environment, never from a file."""

    base_url: str = "https://api.openai.com/v1"
    model: str = ""
    api_key_variable: str = "OPENAI_API_KEY"
    cache_path: str = ""  # folder of answers by content hash; empty keeps none
    concurrency: int = Field(default=8, ge=1)
    requests_per_minute: float = Field(default=500.0, gt=0.0)
    max_retries: int = Field(default=4, ge=0)  # after the first attempt, for 408, 409, 429, 5xx and lost connections
    retry_seconds: float = Field(default=1.0, ge=0.0)  # first pause; it doubles, and Retry-After overrides it
    timeout_seconds: float = Field(default=60.0, gt=0.0)
    max_tokens: int = Field(default=512, ge=16)
    temperature: float = Field(default=0.7, ge=0.0)
    input_price: float = Field(default=0.0, ge=0.0)  # per million tokens, in any currency
    output_price: float = Field(default=0.0, ge=0.0)


class FilterConfig(Config):
    """What a rewrite must keep to."""

    max_length_change: float = Field(default=0.35, gt=0.0)  # share of the caption's words; events are exempt
    min_allowed_words: int = Field(default=2, ge=0)  # so many words' difference is always allowed
    max_event_words: int = Field(default=24, ge=1)  # words that an event may add


class HallucinationConfig(Config):
    """Which hallucinated captions are made, and how."""

    generator: Literal["rules", "transformers", "endpoint"] = "rules"
    seed: int = 0
    types: tuple[RewriteType, ...] = Field(default=("object", "attribute", "relation", "event"), min_length=1)
    rules: RulesConfig = RulesConfig()
    transformers: TransformersConfig = TransformersConfig()
    endpoint: EndpointConfig = EndpointConfig()
    filter: FilterConfig = FilterConfig()
    max_pair_accuracy: Share = 0.60  # text-only, for object, attribute and relation
    max_event_pair_accuracy: Share = 0.70
