"""What the endpoints' bodies share. A field that is not listed is refused, never ignored."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Discriminator, Field, Tag, model_validator

MAX_FIELDS = 64
"""Of one object in a request: what bounds the faults that an answer about it lists."""


def _encodable(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("half of a surrogate pair is no character") from None
    return text


def one_or_list(value: Any) -> str:
    """Which branch of ``X | list[X]`` a value is for."""
    return "list" if isinstance(value, list) else "one"


Text = Annotated[str, AfterValidator(_encodable)]
StopString = Annotated[str, Field(min_length=1, max_length=256), AfterValidator(_encodable)]
Number = Annotated[float, Field(allow_inf_nan=False)]
TokenId = Annotated[str, Field(pattern=r"^[0-9]{1,9}$")]


class Body(BaseModel):
    """Base of all request bodies and of what they hold."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _few_fields(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > MAX_FIELDS:
            raise ValueError(f"an object has {len(value)} fields; no object here has more than {MAX_FIELDS}")
        return value


class StreamOptions(Body):
    """`include_usage`: send the token counts in a last chunk; `continuous_usage_stats`: and those so far in every one,
    as vLLM does."""

    include_usage: bool = False
    continuous_usage_stats: bool = False


class Extensions(Body):
    """What this server adds to OpenAI's API.

    `return_token_ids`: give each choice's token ids, in its `shellv` object. `hallucination`: say there what in the
    answer may be made up; in a stream with the choice's last chunk.
    """

    return_token_ids: bool = False
    hallucination: bool = False


class SamplingBody(Body):
    """Fields that every generating endpoint takes, spelled as OpenAI and, where it has none, as vLLM spells them."""

    model: Text | None = Field(None, description="A served model's id; left out, the default one.")
    max_tokens: Annotated[int, Field(ge=1, le=2**31)] | None = Field(
        None, description="The longest answer; left out, 512 or what the context has room for."
    )
    min_tokens: Annotated[int, Field(ge=0, le=2**31)] | None = Field(
        None, description="No answer ends by itself before this many tokens."
    )
    temperature: Annotated[Number, Field(ge=0, le=2)] | None = Field(
        None, description="0, the default, is greedy decoding."
    )
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=2**31)] | None = Field(None, description="-1 or 0, the default, for all.")
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[Number, Field(gt=0, le=10)] | None = None
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = None
    logit_bias: Annotated[dict[TokenId, Annotated[Number, Field(ge=-100, le=100)]], Field(max_length=300)] | None = None
    seed: Annotated[int, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[
            Annotated[StopString, Tag("one")] | Annotated[list[StopString], Field(max_length=4), Tag("list")],
            Discriminator(one_or_list),
        ]
        | None
    ) = None
    n: Annotated[int, Field(ge=1, le=4)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: Annotated[Text, Field(max_length=256)] | None = Field(
        None, description="Who asks; one user stays on one side where a model's traffic is split."
    )
    shellv: Extensions | None = None


class Usage(BaseModel):
    """Token counts of one request; a prompt with several answers counts once."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


class MentionedObject(BaseModel):
    """A mention of an object, ``answer[start:end]`` in characters.

    `name` is COCO's class. `confidence` and `probability` are the geometric mean and the product of the probabilities
    of the tokens that spell it. `risk`, the probability that it is not in the picture, and `marked`, whether its
    confidence is under the calibrated threshold, are null where the server has no thresholds for the model.
    """

    name: str
    text: str
    start: int
    end: int
    confidence: float
    probability: float
    risk: float | None
    marked: bool | None


class GroundedSentence(BaseModel):
    """A sentence, ``answer[start:end]`` in characters.

    `confidence` is the geometric mean of its tokens' probabilities. `margin` is how much closer HACL's heads hold it to
    the picture than to a blank one (-2 to 2), null without heads or picture; `risk` and `marked` are as of an object,
    by the margin.
    """

    text: str
    start: int
    end: int
    confidence: float
    margin: float | None
    risk: float | None
    marked: bool | None


class Hallucination(BaseModel):
    """What in an answer may be made up."""

    objects: list[MentionedObject]
    sentences: list[GroundedSentence]


class ChoiceExtensions(BaseModel):
    """What this server adds to a choice."""

    token_ids: list[int] | None = None
    hallucination: Hallucination | None = None


FinishReason = Literal["stop", "length"]
