"""Settings of the hallucinated captions."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from shellv_core.config import Config
from shellv_core.endpoint.config import EndpointConfig

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
