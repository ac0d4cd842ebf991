"""Tokens to text, piece by piece, cut before the first stop string."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

REPLACEMENT_CHARACTER = "\ufffd"


class Detokenizer:
    """Turns one answer's token ids into text as they come.

    Text is held back while it may still change: bytes of an unfinished character, and an ending that may grow into a
    stop string. White space before the answer's first word parts it from the prompt and is left out.

    Args:
        tokenizer: a transformers tokenizer; its special tokens leave no text.
        stop: strings that end the answer; they are not part of it.
    """

    def __init__(self, tokenizer: Any, stop: Sequence[str] = ()) -> None:
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._token_ids: list[int] = []
        self._prefix_start = self._unread_start = 0
        self._held = ""
        self._begun = False
        self.stopped = False

    def push(self, token_id: int, may_stop: bool = True) -> str:
        """Add a token; returns the text that became final. `stopped` is True once a stop string was met.

        Without `may_stop`, a stop string in this text is text like any other.
        """
        self._token_ids.append(token_id)
        return self._release(self._decode_new(complete=False), self._stop if may_stop else (), final=False)

    def finish(self) -> str:
        """The text that was still held back; call once, after the last token."""
        return self._release(self._decode_new(complete=True), self._stop, final=True)

    def _decode_new(self, complete: bool) -> str:
        # The tokens just before the new ones are decoded along with them: many decoders drop the space that leads
        # a sequence, and only in context is it known whether there is one.
        known = self._decode(self._token_ids[self._prefix_start : self._unread_start])
        full = self._decode(self._token_ids[self._prefix_start :])
        if len(full) <= len(known) or (full.endswith(REPLACEMENT_CHARACTER) and not complete):
            return ""
        self._prefix_start, self._unread_start = self._unread_start, len(self._token_ids)
        return full[len(known) :]

    def _decode(self, token_ids: list[int]) -> str:
        text: str = self._tokenizer.decode(token_ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        return text

    def _release(self, new: str, stops: tuple[str, ...], final: bool) -> str:
        if self.stopped:
            return ""
        text = self._held + new
        if not self._begun:
            text = text.lstrip()
            self._begun = bool(text)
        found = [position for position in map(text.find, stops) if position >= 0]
        if found:
            self.stopped, self._held = True, ""
            return text[: min(found)]
        keep = 0 if final else max((_overlap(text, stop) for stop in stops), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]


def _overlap(text: str, stop: str) -> int:
    """Length of the longest ending of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
