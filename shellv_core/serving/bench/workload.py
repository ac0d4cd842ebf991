"""The requests of a load: seeded, of exact lengths, the same for every server that is compared."""

from __future__ import annotations

import base64
import io
import re
from dataclasses import dataclass
from random import Random
from typing import Any

from pydantic import Field, field_validator

from shellv_core.config import Config

# Common and short, so that most tokenizers have one token for each.
WORDS = (
    "the", "of", "and", "to", "in", "a", "is", "that", "for", "it", "as", "was", "with", "be", "by", "on",
    "not", "he", "his", "but", "at", "are", "this", "have", "from", "or", "had", "an", "they", "which", "one",
    "you", "were", "all", "her", "she", "there", "would", "their", "we", "him", "been", "has", "when", "who",
    "will", "no", "more", "if", "out", "so", "up", "said", "what", "its", "about", "than", "into", "them",
    "can", "only", "other", "time", "new", "some", "could", "these", "two", "may", "first", "then", "do",
    "any", "like", "my", "now", "over", "such", "our", "man",
)  # fmt: skip
_LENGTHS = re.compile(r"(\d+)(?:-(\d+))?")
_PIXELS_PER_BLOCK = 8


class Workload(Config):
    """What is asked.

    Attributes:
        requests: how many, in each round.
        lengths: tokens of an answer, ``64`` or drawn evenly from ``8-200``; answers end neither before nor after.
        prompt_words: words of a prompt, about as many tokens.
        image_share: of the requests, in [0, 1], those with a picture; each has one of its own.
        image_size: width and height of the pictures, in pixels.
        seed: of everything that is drawn; each round has requests of its own.
    """

    requests: int = Field(default=64, ge=1)
    lengths: str = "64"
    prompt_words: int = Field(default=64, ge=1)
    image_share: float = Field(default=0.0, ge=0.0, le=1.0)
    image_size: int = Field(default=224, ge=8, le=4096)
    seed: int = 0

    @field_validator("lengths")
    @classmethod
    def _check_lengths(cls, value: str) -> str:
        match = _LENGTHS.fullmatch(value)
        if match is None or not 1 <= int(match[1]) <= int(match[2] or match[1]):
            raise ValueError(f"lengths={value!r} is neither a number of tokens (64) nor a range of them (8-200)")
        return value

    def length_range(self) -> tuple[int, int]:
        """The shortest and the longest answer."""
        match = _LENGTHS.fullmatch(self.lengths)
        if match is None:
            raise ValueError(self.lengths)  # was checked
        return int(match[1]), int(match[2] or match[1])


@dataclass(frozen=True)
class Wanted:
    """A request's body, less the model's name, and how many tokens its answer has."""

    body: dict[str, Any]
    tokens: int


def make_requests(workload: Workload, round_number: int, model: str) -> list[Wanted]:
    """The requests of one round, greedy."""
    rng = Random(f"{workload.seed}/{round_number}")
    shortest, longest = workload.length_range()
    with_picture = round(workload.image_share * workload.requests)
    pictured = set(rng.sample(range(workload.requests), with_picture))
    wanted = []
    for index in range(workload.requests):
        tokens = rng.randint(shortest, longest)
        text = " ".join(rng.choice(WORDS) for _ in range(workload.prompt_words))
        content: Any = text
        if index in pictured:
            url = f"data:image/png;base64,{base64.b64encode(_picture(rng, workload.image_size)).decode()}"
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        body = {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "temperature": 0,
            "max_tokens": tokens,
            "min_tokens": tokens,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        wanted.append(Wanted(body, tokens))
    return wanted


def _picture(rng: Random, size: int) -> bytes:
    """A PNG of colored blocks."""
    from PIL import Image

    blocks = max(size // _PIXELS_PER_BLOCK, 1)
    image = Image.frombytes("RGB", (blocks, blocks), rng.randbytes(3 * blocks * blocks))
    buffer = io.BytesIO()
    image.resize((size, size), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()
