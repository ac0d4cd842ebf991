"""Keys and values of many sequences at once: one slot each, in tensors that are there before the tokens are.

Axes: slots, heads, positions (a multiple of `PAGE`), head dimension. Sequences that decode together lie in the first
slots, so that attention reads them without a copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin

#: Positions are added by as many at a time.
PAGE = 256
#: Attention kernels on GPUs want lengths that are multiples of this.
ALIGNMENT = 8


def pages(num_tokens: int) -> int:
    """`num_tokens` rounded up to whole pages."""
    return -(-num_tokens // PAGE) * PAGE


class Placement:
    """Where the new tokens of a batch belong.

    Args:
        slots: each sequence's slot.
        starts: position of each sequence's first new token.
        counts: new tokens of each sequence; the batch is padded on the right to the largest.
    """

    def __init__(self, slots: Sequence[int], starts: Sequence[int], counts: Sequence[int]) -> None:
        self.slots, self.starts, self.counts = list(slots), list(starts), list(counts)
        longest = max(start + count for start, count in zip(starts, counts, strict=True))
        #: Positions that the batch attends to; those beyond a sequence's own are masked.
        self.length = -(-longest // ALIGNMENT) * ALIGNMENT
        self.in_front = self.slots == list(range(len(self.slots)))
        self._on: dict[torch.device, tuple[torch.Tensor, ...]] = {}

    def on(self, device: torch.device) -> tuple[torch.Tensor, ...]:
        """Index vectors on `device`: sequence and place in the batch of each new token, its slot and its position;
        and the slots of the sequences."""
        if device not in self._on:
            entries = [
                (index, place, slot, start + place)
                for index, (slot, start, count) in enumerate(zip(self.slots, self.starts, self.counts, strict=True))
                for place in range(count)
            ]
            vectors = torch.tensor(entries, dtype=torch.long).T.contiguous().to(device, non_blocking=True)
            self._on[device] = (*vectors, torch.tensor(self.slots, device=device))
        return self._on[device]

    def position_ids(self, device: torch.device) -> torch.Tensor:
        """Position of each token of the batch, padding included: [sequences, tokens]."""
        starts = torch.tensor(self.starts, device=device)
        return starts[:, None] + torch.arange(max(self.counts), device=device)

    def mask(self, position_ids: torch.Tensor) -> torch.Tensor:
        """Which positions each token sees, itself and those before: bool [sequences, 1, tokens, length]."""
        return (torch.arange(self.length, device=position_ids.device) <= position_ids[..., None])[:, None]


class SlotLayer(CacheLayerMixin):
    """One layer's keys and values; `placement` is that of the batch under way."""

    def __init__(self) -> None:
        super().__init__()
        self.placement: Placement | None = None
        self.num_slots = self.capacity = 0

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Make the tensors, on the device where the layer is."""
        # Zeros, since what is masked must still be a number.
        shape = (self.num_slots, key_states.shape[1], self.capacity)
        self.keys = key_states.new_zeros((*shape, key_states.shape[3]))
        self.values = value_states.new_zeros((*shape, value_states.shape[3]))
        self.is_initialized = True

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Write [sequences, heads, tokens, dim] to their places; returns all that the batch attends to."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        keys, values, placement = self._tensors()
        sequence_N, place_N, slot_N, position_N, slots = placement.on(key_states.device)
        keys[slot_N, :, position_N] = key_states[sequence_N, :, place_N]
        values[slot_N, :, position_N] = value_states[sequence_N, :, place_N]
        if placement.in_front:
            count = len(placement.slots)
            return keys[:count, :, : placement.length], values[:count, :, : placement.length]
        return keys[:, :, : placement.length][slots], values[:, :, : placement.length][slots]

    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor, Placement]:
        if self.keys is None or self.values is None or self.placement is None:
            raise RuntimeError("a layer's tensors and the batch's placement come before its tokens")
        return self.keys, self.values, self.placement

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Not asked: the mask is given."""
        return (self.placement.length if self.placement else query_length), 0

    def get_seq_length(self) -> int:
        """Not asked: positions are given."""
        return 0

    def get_max_length(self) -> int:
        """The longest sequence."""
        return self.capacity

    def resize(self, num_slots: int, capacity: int) -> None:
        """Change the tensors' shape and keep what fits both; may be repeated after it failed."""
        self.num_slots, self.capacity = num_slots, capacity
        for name in ("keys", "values") if self.is_initialized else ():
            old = getattr(self, name)
            slots, positions = min(num_slots, old.shape[0]), min(capacity, old.shape[2])
            new = old.new_zeros((num_slots, old.shape[1], capacity, old.shape[3]))
            new[:slots, :, :positions] = old[:slots, :, :positions]
            setattr(self, name, new)


class SlotCache(Cache):
    """The cache of all layers."""

    def __init__(self, num_layers: int) -> None:
        self.slot_layers = [SlotLayer() for _ in range(num_layers)]
        super().__init__(layers=list(self.slot_layers))
        self.num_slots = self.capacity = 0

    def place(self, placement: Placement) -> None:
        """Say where the next batch's tokens belong."""
        for layer in self.slot_layers:
            layer.placement = placement

    def resize(self, num_slots: int, capacity: int) -> None:
        """Change the number of slots and of positions in each."""
        for layer in self.slot_layers:
            layer.resize(num_slots, capacity)
        self.num_slots, self.capacity = num_slots, capacity

    def swap(self, first: int, second: int, length: int) -> None:
        """Exchange the first `length` positions of two slots."""
        for tensor in self._tensors():
            kept = tensor[first, :, :length].clone()
            tensor[first, :, :length] = tensor[second, :, :length]
            tensor[second, :, :length] = kept

    def copy(self, source: int, target: int, length: int) -> None:
        """Copy the first `length` positions of a slot to another."""
        for tensor in self._tensors():
            tensor[target, :, :length] = tensor[source, :, :length]

    def clear(self, slot: int) -> None:
        """Overwrite a slot that may hold what is no number."""
        for tensor in self._tensors():
            tensor[slot].zero_()

    def _tensors(self) -> list[torch.Tensor]:
        return [tensor for layer in self.slot_layers for tensor in (layer.keys, layer.values) if tensor is not None]
