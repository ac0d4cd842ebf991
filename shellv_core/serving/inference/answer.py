"""One answer as it grows: chosen tokens become text and events, until something ends it."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shellv_core.serving.detokenizer import REPLACEMENT_CHARACTER, Detokenizer
from shellv_core.serving.engine import FinishReason, GenerationRequest, TokenChance, TokenEvent, TokenLogprob
from shellv_core.serving.prompt import Prompt
from shellv_core.serving.sampling import Choice, Sampler

if TYPE_CHECKING:
    import torch

#: Probability zero, in numbers that JSON has.
LEAST_LOGPROB = -9999.0


class Vocabulary:
    """What a model's tokens mean.

    Args:
        tokenizer: used by one thread at a time.
        size: length of the model's logits.
        end_ids: tokens that end an answer.
        stop_strings: texts that end an answer beside a request's own.
    """

    def __init__(self, tokenizer: Any, size: int, end_ids: frozenset[int], stop_strings: Sequence[str] = ()) -> None:
        self.tokenizer, self.size, self.end_ids, self.stop_strings = tokenizer, size, end_ids, tuple(stop_strings)
        self._special_ids = frozenset(tokenizer.all_special_ids)
        self.describe = functools.lru_cache(maxsize=65536)(self._describe)

    def chance(self, token_id: int, logprob: float) -> TokenChance:
        """A token beside its log-probability."""
        token, raw = self.describe(token_id)
        return TokenChance(token_id, token, raw, max(logprob, LEAST_LOGPROB))

    def _describe(self, token_id: int) -> tuple[str, bytes]:
        # Beside another token, since many decoders drop the space that leads a sequence.
        anchor = self.tokenizer.encode("a", add_special_tokens=False)[-1:]
        alone = str(self.tokenizer.decode(anchor, clean_up_tokenization_spaces=False))
        both = str(self.tokenizer.decode([*anchor, token_id], clean_up_tokenization_spaces=False))
        token = both.removeprefix(alone)
        if token_id in self._special_ids:
            return token, b""
        return token, token.encode() if REPLACEMENT_CHARACTER not in token else self._bytes_of_part(token_id)

    def _bytes_of_part(self, token_id: int) -> bytes:
        """The bytes of a token that holds part of a character, by either way in which vocabularies spell bytes."""
        spelling = str(self.tokenizer.convert_ids_to_tokens(token_id))
        if spelling.startswith("<0x") and len(spelling) == len("<0x00>"):
            return bytes([int(spelling[3:5], 16)])
        byte_of = _byte_level_alphabet()
        return bytes(byte_of[character] for character in spelling if character in byte_of)


@functools.cache
def _byte_level_alphabet() -> dict[str, int]:
    """The characters by which byte-level vocabularies spell bytes: printable ones as they are, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + place): byte for place, byte in enumerate(others)}


@dataclass(frozen=True)
class Task:
    """What is to be answered, checked: `max_tokens` more tokens fit the context."""

    request: GenerationRequest
    prompt: Prompt
    max_tokens: int


class Answer:
    """The state of one answer between its tokens."""

    def __init__(self, task: Task, vocabulary: Vocabulary, device: torch.device | str = "cpu") -> None:
        self._task, self._vocabulary = task, vocabulary
        self.sampler = Sampler(task.request, task.prompt.token_ids, vocabulary.end_ids, vocabulary.size, device)
        self._detokenizer = Detokenizer(vocabulary.tokenizer, (*task.request.stop, *vocabulary.stop_strings))
        self.token_ids: list[int] = []

    def opening(self) -> TokenEvent:
        """The event before all tokens."""
        return TokenEvent("", len(self._task.prompt.token_ids), 0)

    def advance(self, choice: Choice) -> TokenEvent:
        """Add a token; the event has a finish reason if the answer ends with it."""
        task, token_id = self._task, choice.token_id
        self.token_ids.append(token_id)
        count = len(self.token_ids)
        ended = token_id in self._vocabulary.end_ids
        text = "" if ended else self._detokenizer.push(token_id, may_stop=count >= task.request.min_tokens)
        reason: FinishReason | None = "stop" if ended or self._detokenizer.stopped else None
        if reason is None and count == task.max_tokens:
            reason = "length"
        if reason is not None:
            text += self._detokenizer.finish()
            # What was held back may hold a stop string that the last token's bytes completed.
            reason = "stop" if self._detokenizer.stopped else reason
        return TokenEvent(text, len(task.prompt.token_ids), count, reason, (token_id,), self._logprobs(choice))

    def _logprobs(self, choice: Choice) -> tuple[TokenLogprob, ...]:
        if choice.logprob is None:
            return ()
        chosen = self._vocabulary.chance(choice.token_id, choice.logprob)
        top = tuple(self._vocabulary.chance(token_id, logprob) for token_id, logprob in choice.top)
        return (TokenLogprob(chosen.token_id, chosen.token, chosen.bytes, chosen.logprob, top),)
