"""One pass of the language model over tokens of several rows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from shellv_core.serving.inference.adapters import AdapterSet
from shellv_core.serving.inference.cache import Placement, SlotCache
from shellv_core.serving.inference.slots import Row

if TYPE_CHECKING:
    import torch


def run_language_model(model: Any, cache: SlotCache, placement: Placement, embeddings: torch.Tensor) -> torch.Tensor:
    """Logits [sequences, vocabulary] after the last tokens of `embeddings` [sequences, tokens, hidden size]."""
    import torch

    cache.place(placement)
    position_ids = placement.position_ids(embeddings.device)
    hidden_states = model.model.language_model(
        inputs_embeds=embeddings,
        attention_mask=placement.mask(position_ids),
        position_ids=position_ids,
        past_key_values=cache,
        use_cache=True,
    ).last_hidden_state
    device = hidden_states.device
    last = torch.tensor(placement.counts, device=device) - 1
    logits: torch.Tensor = model.lm_head(hidden_states[torch.arange(len(last), device=device), last])
    return logits


class Forward:
    """Reads the next tokens of rows into the cache.

    Args:
        model: a LLaVA model of transformers whose language model attends to all positions.
    """

    def __init__(self, model: Any, adapters: AdapterSet, cache: SlotCache) -> None:
        self._model, self._adapters, self._cache = model, adapters, cache
        self._embed = model.get_input_embeddings()

    def __call__(self, rows: Sequence[Row], counts: Sequence[int]) -> torch.Tensor:
        """Logits [rows, vocabulary] after the next `counts` tokens of each row.

        Rows are left as they are: it may be repeated, and nothing is lost if it fails.
        """
        import torch

        batches = self._adapters.batches([row.adapter for row in rows])
        if len(batches) == 1:
            return self._run(rows, counts)
        parts = [self._run([rows[index] for index in batch], [counts[index] for index in batch]) for batch in batches]
        order = np.argsort([index for batch in batches for index in batch])
        return torch.cat(parts)[torch.from_numpy(order)]

    def _run(self, rows: Sequence[Row], counts: Sequence[int]) -> torch.Tensor:
        placement = Placement([row.slot for row in rows], [row.filled for row in rows], counts)
        with self._adapters.together([row.adapter for row in rows]):
            embeddings = self._embeddings(rows, counts, self._embed.weight.device)
            return run_language_model(self._model, self._cache, placement, embeddings)

    def _embeddings(self, rows: Sequence[Row], counts: Sequence[int], device: torch.device) -> torch.Tensor:
        import torch

        width = max(counts)
        token_ids = np.zeros((len(rows), width), dtype=np.int64)
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            prompt_ids = row.job.task.prompt.token_ids
            end = row.filled + count
            known = prompt_ids[row.filled : end] if row.filled < len(prompt_ids) else row.contents[row.filled : end]
            token_ids[index, :count] = known
        embeddings: torch.Tensor = self._embed(torch.from_numpy(token_ids).to(device))
        for index, (row, count) in enumerate(zip(rows, counts, strict=True)):
            if row.filled < row.prompt_length:
                self._place_images(embeddings[index], row, count)
        return embeddings

    def _place_images(self, embeddings: torch.Tensor, row: Row, count: int) -> None:
        """Put image features over the embeddings [tokens, hidden size] of the row's image tokens among the next."""
        import torch

        offset = 0
        for image, features in zip(row.job.task.prompt.images, row.features, strict=True):
            positions = row.image_positions[offset : offset + image.num_tokens]
            offset += image.num_tokens
            within = np.flatnonzero((positions >= row.filled) & (positions < row.filled + count))
            if within.size and features is not None:
                places = torch.from_numpy(positions[within] - row.filled).to(embeddings.device)
                chosen = features[torch.from_numpy(within).to(features.device)]
                embeddings[places] = chosen.to(embeddings.device, embeddings.dtype)
