"""Which request has which slot, and what freed slots still remember.

Requests lie in the first slots without a gap: those that decode, then those whose prompt is still being read. The
slots behind are free; their tokens stay until another request needs the place, and a request whose prompt begins with
the same tokens takes them over instead of computing them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from shellv_core.serving.inference.answer import Answer
from shellv_core.serving.inference.cache import SlotCache, pages
from shellv_core.serving.inference.job import Job
from shellv_core.serving.prompt import Prompt

if TYPE_CHECKING:
    import torch


def content_ids(prompt: Prompt) -> list[int]:
    """The prompt's tokens with each image token replaced by a negative number that names its picture."""
    names = [-1 - int(image.sha256[:15], 16) for image in prompt.images for _ in range(image.num_tokens)]
    following = iter(names)
    return [next(following) if token_id == prompt.image_token_id else token_id for token_id in prompt.token_ids]


@dataclass(eq=False)
class Row:
    """A running request.

    Attributes:
        contents: what its slot's positions hold: the prompt's `content_ids`, then the generated tokens.
        filled: positions whose keys and values are computed.
        need: positions that it may come to fill.
        image_positions: places of image tokens in the prompt.
        features: of each picture, [num_tokens, hidden size]; None while they are not needed or not computed.
    """

    job: Job
    answer: Answer
    contents: list[int]
    need: int
    order: int
    slot: int = -1
    filled: int = 0
    image_positions: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    features: list[torch.Tensor | None] = field(default_factory=list)

    @property
    def adapter(self) -> str | None:
        """Name of the adapter that answers."""
        return self.job.task.request.adapter

    @property
    def prompt_length(self) -> int:
        """Tokens of the prompt."""
        return len(self.job.task.prompt.token_ids)

    @property
    def decodes(self) -> bool:
        """Whether the whole prompt is read."""
        return self.filled >= self.prompt_length


@dataclass
class Memory:
    """What a free slot still holds: the contents of its first positions, computed under an adapter."""

    contents: np.ndarray
    adapter: str | None
    last_used: int


class SlotTable:
    """Keeps rows in front, and finds the best slot for a new one.

    Args:
        cache: keys and values; resized here.
        max_slots: rows at most.
        max_tokens: positions of all slots together at most.
    """

    def __init__(self, cache: SlotCache, max_slots: int, max_tokens: int) -> None:
        self.cache, self.max_slots, self.max_tokens = cache, max_slots, max_tokens
        self.rows: list[Row] = []
        self.num_decoding = 0
        self._memories: dict[int, Memory] = {}
        self._clock = 0

    @property
    def decoding(self) -> list[Row]:
        """Rows whose prompt is read, by slot."""
        return self.rows[: self.num_decoding]

    @property
    def reading(self) -> list[Row]:
        """Rows whose prompt is being read, oldest first."""
        return sorted(self.rows[self.num_decoding :], key=lambda row: row.order)

    def fits(self, need: int) -> bool:
        """Whether a row of `need` positions finds room beside those that run."""
        count = len(self.rows) + 1
        return count <= self.max_slots and count * self._capacity(need) <= self.max_tokens

    def add(self, row: Row) -> None:
        """Give `row` a slot, with as much of its prompt as some slot remembers already in it."""
        count, capacity = len(self.rows) + 1, self._capacity(row.need)
        if count > self.cache.num_slots or capacity > self.cache.capacity:
            self._resize(min(self.max_slots, self.max_tokens // capacity), capacity)
        target = len(self.rows)
        source, length = self._longest_prefix(row)
        if source is not None and source in self._memories:
            self._move(source, target)
        else:
            # Of the free slots the one that was used longest ago gives up what it remembers.
            free = range(target, self.cache.num_slots)
            oldest = min(free, key=lambda slot: self._memories[slot].last_used if slot in self._memories else -1)
            self._move(oldest, target)
            if source is not None:
                self.cache.copy(source, target, length)
        self._memories.pop(target, None)
        row.slot, row.filled = target, length
        self.rows.append(row)

    def start_decoding(self, row: Row) -> None:
        """Move a row whose prompt is read to those that decode."""
        self._exchange(row.slot, self.num_decoding)
        self.num_decoding += 1

    def remove(self, row: Row, remember: bool = True) -> None:
        """Free a row's slot."""
        if row.slot < self.num_decoding:
            self._exchange(row.slot, self.num_decoding - 1)
            self.num_decoding -= 1
        self._exchange(row.slot, len(self.rows) - 1)
        self.rows.pop()
        if remember:
            self._clock += 1
            contents = np.array(row.contents[: row.filled], dtype=np.int64)
            self._memories[row.slot] = Memory(contents, row.adapter, self._clock)
        else:
            self.cache.clear(row.slot)

    def forget(self) -> None:
        """Give up what free slots remember, and their memory."""
        self._memories.clear()
        self._resize(len(self.rows), self._capacity(0) if self.rows else 0)

    def _capacity(self, need: int) -> int:
        return pages(max([need, *(row.need for row in self.rows)]))

    def _resize(self, num_slots: int, capacity: int) -> None:
        self.cache.resize(num_slots, capacity)
        for slot, memory in list(self._memories.items()):
            if slot >= num_slots:
                del self._memories[slot]
            else:
                memory.contents = memory.contents[:capacity]

    def _longest_prefix(self, row: Row) -> tuple[int | None, int]:
        """The slot, running or free, that holds most of the row's prompt, and how much of it can be taken over."""
        contents = np.array(row.contents, dtype=np.int64)
        found: tuple[int | None, int] = (None, 0)
        held = {slot: memory.contents for slot, memory in self._memories.items() if memory.adapter == row.adapter}
        for other in self.rows:
            if other.adapter == row.adapter:
                held[other.slot] = np.array(other.contents[: other.filled], dtype=np.int64)
        for slot, other_contents in held.items():
            # The last token is always computed, for its logits.
            length = min(len(other_contents), len(contents) - 1)
            differing = np.flatnonzero(other_contents[:length] != contents[:length])
            length = int(differing[0]) if differing.size else length
            if length > found[1]:
                found = slot, length
        return found

    def _move(self, slot: int, target: int) -> None:
        """Exchange two free slots."""
        if slot == target:
            return
        memories = self._memories.pop(slot, None), self._memories.pop(target, None)
        self.cache.swap(slot, target, max([len(memory.contents) for memory in memories if memory], default=0))
        for place, memory in zip((target, slot), memories, strict=True):
            if memory:
                self._memories[place] = memory

    def _exchange(self, first: int, second: int) -> None:
        """Exchange two rows."""
        if first == second:
            return
        one, other = self.rows[first], self.rows[second]
        self.cache.swap(first, second, max(one.filled, other.filled))
        self.rows[first], self.rows[second] = other, one
        one.slot, other.slot = second, first


def image_positions(prompt: Prompt) -> np.ndarray:
    """Places of the image tokens."""
    return np.flatnonzero(np.array(prompt.token_ids, dtype=np.int64) == prompt.image_token_id)


def pending_images(row: Row) -> Sequence[int]:
    """Indices of the pictures of which tokens are still to be read."""
    ends = np.cumsum([image.num_tokens for image in row.job.task.prompt.images])
    return [index for index, end in enumerate(ends) if row.image_positions[end - 1] >= row.filled]
