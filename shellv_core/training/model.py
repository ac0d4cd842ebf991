"""The model as it is trained: one forward pass per batch gives the generation loss and the contrastive losses.

Image features are projected once and shared by both. Sequences are right-padded and attention is causal, so padding
needs no mask: nothing that counts comes after it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from shellv_core.models.hacl import HaclHeads
from shellv_core.training.batches import Batch, ContrastBatch
from shellv_core.training.config import HaclConfig
from shellv_core.training.losses import ContrastiveResult, contrastive_loss
from shellv_core.training.packed import PackedRow, forward_packed


@dataclass(frozen=True)
class StepOutput:
    """Sum of the generation loss over the batch's label tokens, and the contrastive losses where wanted."""

    generation_loss_sum: torch.Tensor
    contrast: ContrastiveResult | None


class TrainingModel(nn.Module):
    """A LLaVA model (adapters, if any, already in place) with HACL's heads beside it."""

    def __init__(
        self, model: LlavaForConditionalGeneration, heads: HaclHeads | None = None, hacl: HaclConfig | None = None
    ) -> None:
        super().__init__()
        self.model, self.heads, self.hacl = model, heads, hacl or HaclConfig()
        eos_token_id = model.generation_config.eos_token_id
        self.eos_token_id = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id

    def forward(self, batch: Batch | PackedRow) -> StepOutput:
        """See `Batch` and `PackedRow` for the shapes."""
        if isinstance(batch, PackedRow):
            return StepOutput(*forward_packed(self, batch))
        embeddings_BTH = self.model.get_input_embeddings()(batch.input_ids)
        hidden_size = embeddings_BTH.shape[-1]
        images_UNH = None
        if batch.image_features is not None:
            features = batch.image_features.to(embeddings_BTH.dtype)
            images_UNH = self.model.model.multi_modal_projector(features).to(embeddings_BTH.dtype)
            flat = embeddings_BTH.reshape(-1, hidden_size)
            rows = images_UNH[batch.row_images].reshape(-1, hidden_size)
            embeddings_BTH = flat.index_copy(0, batch.image_positions, rows).view_as(embeddings_BTH)
        hidden = self._language_model(embeddings_BTH).reshape(-1, hidden_size)
        logits = self.model.lm_head(hidden[batch.label_positions]).float()
        loss = functional.cross_entropy(logits, batch.label_ids, reduction="sum")
        contrast = None
        if self.heads is not None and batch.contrast is not None and images_UNH is not None:
            contrast = self._contrast(self.heads, images_UNH, batch.contrast)
        return StepOutput(loss, contrast)

    def _language_model(self, embeddings: torch.Tensor) -> torch.Tensor:
        return self.model.model.language_model(inputs_embeds=embeddings, use_cache=False).last_hidden_state

    def _contrast(self, heads: HaclHeads, images_UNH: torch.Tensor, batch: ContrastBatch) -> ContrastiveResult:
        """Compare the last hidden states of [image, eos] and of [text, eos], run apart from each other."""
        embed = self.model.get_input_embeddings()
        images_PNH = images_UNH[batch.images]
        num_images = len(images_PNH)
        eos = embed(batch.text_ids.new_full((num_images, 1), self.eos_token_id)).to(images_PNH.dtype)
        image_states = self._language_model(torch.cat([images_PNH, eos], dim=1))[:, -1]
        text_hidden = self._language_model(embed(batch.text_ids))
        text_states = text_hidden[torch.arange(len(text_hidden), device=text_hidden.device), batch.text_ends]
        texts = heads.embed_texts(text_states)
        num_hallucinated = batch.hallucinated_valid.shape[1]
        return contrastive_loss(
            heads.embed_images(image_states),
            texts[:num_images],
            texts[num_images:].view(num_images, num_hallucinated, texts.shape[-1]),
            heads.temperature,
            self.hacl.negatives,
            hallucinated_valid=batch.hallucinated_valid,
            caption_group=batch.caption_groups,
            hallucinated_group=batch.hallucinated_groups,
        )
