"""How the conversations of a sample become token ids; all that packing and loading know of tokenizers and templates."""

from __future__ import annotations

import copy
import functools
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from shellv_core.data.conversation import encode_conversations
from shellv_core.data.samples import IMAGE_TOKEN, Conversation, Sample, sample_conversations
from shellv_core.errors import ConfigError
from shellv_core.templates import Template, add_template_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

NO_LIMIT = 1 << 30

_PROBE: list[Conversation] = [
    [
        {"from": "human", "value": f"{IMAGE_TOKEN}\nWhat is it?"},
        {"from": "gpt", "value": "A cat — 猫 🐈."},
        {"from": "human", "value": "  Of which color?\n"},
        {"from": "gpt", "value": "Black, I'd say"},
    ],
    [{"from": "human", "value": "Hello"}, {"from": "gpt", "value": "Hi there!"}],
]


def load_tokenizer(address: str, setting: str, template: Template) -> PreTrainedTokenizerBase:
    """The tokenizer at `address` (a directory or hub id), with the template's special tokens.

    Raises:
        ConfigError: if it cannot be loaded; `setting` names what the user gave.
    """
    from transformers import AutoTokenizer

    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(address)
    except (OSError, ValueError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"{setting}={address!r} cannot be loaded: {reason} Give a tokenizer's directory.") from None
    add_template_tokens(tokenizer, template)
    return tokenizer


class Encode(Protocol):
    """The function `conversation.encode_conversations` or one of its kind."""

    def __call__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        conversations: Sequence[Conversation],
        image_token_id: int,
        num_image_tokens: int,
        max_length: int,
    ) -> Iterable[tuple[np.ndarray, np.ndarray]]:
        """(input_ids, labels), int32 (length,), of each conversation; labels are -100 where nothing is learned."""


@dataclass(frozen=True, eq=False)
class ConversationEncoder:
    """Encodes the conversations of samples. Safe to use from several threads.

    Attributes:
        tokenizer: a fast tokenizer, the image token among its tokens.
        image_token_id: id of the image token.
        tasks: take only conversations of these tasks from samples that tell their tasks; None for all.
        encode: renders and tokenizes.
    """

    tokenizer: PreTrainedTokenizerBase
    image_token_id: int
    tasks: tuple[str, ...] | None = None
    encode: Encode = encode_conversations
    _idle: list[PreTrainedTokenizerBase] = field(default_factory=list, init=False, repr=False)

    def conversations(self, sample: Sample) -> list[Conversation]:
        """The conversations of a sample that are trained on; none is possible."""
        return sample_conversations(sample, self.tasks)

    def __call__(
        self, conversations: Sequence[Conversation], num_image_tokens: int
    ) -> list[tuple[np.ndarray, np.ndarray]]:
        """(input_ids, labels) of each conversation, uncut, the image token `num_image_tokens` times for an image.

        Raises:
            DataError: if a conversation cannot be encoded.
        """
        # transformers keeps settings of a call in the tokenizer, so threads must not share one.
        try:
            tokenizer = self._idle.pop()
        except IndexError:
            tokenizer = copy.deepcopy(self.tokenizer)
        try:
            return list(self.encode(tokenizer, conversations, self.image_token_id, num_image_tokens, NO_LIMIT))
        finally:
            self._idle.append(tokenizer)

    @functools.cached_property
    def identity(self) -> str:
        """Hash (hex) of the tokenizer and of what the template makes of a few conversations."""
        digest = hashlib.sha256(self.tokenizer.backend_tokenizer.to_str().encode())
        for input_ids, labels in self(_PROBE, 1):
            digest.update(input_ids.astype("<i4").tobytes() + labels.astype("<i4").tobytes())
        return digest.hexdigest()
