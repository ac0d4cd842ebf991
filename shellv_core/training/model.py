"""The model as it is trained: one forward pass per batch gives the generation loss and the objectives beside it.

Image features are projected once and shared by all. Sequences are right-padded and attention is causal, so padding
needs no mask: nothing that counts comes after it.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from shellv_core.models.compose import num_image_tokens
from shellv_core.models.hacl import HaclHeads
from shellv_core.models.lora import without_adapters
from shellv_core.training.attention import documents_apart
from shellv_core.training.batches import Batch
from shellv_core.training.config import HaclConfig, PreferenceConfig
from shellv_core.training.cross_entropy import LabelLoss
from shellv_core.training.losses.gather import gather_features
from shellv_core.training.losses.hacl import ContrastFeatures, ContrastResult, contrastive_loss
from shellv_core.training.losses.preference import AnswerLogProbabilities, PreferenceResult, preference_loss
from shellv_core.training.losses.queue import NegativeQueue
from shellv_core.training.packed import PackedRow, forward_packed
from shellv_core.training.pairs import ContrastBatch, ContrastStates, PreferenceBatch, ReadoutBatch
from shellv_core.training.processes import num_processes


@dataclass(frozen=True)
class StepOutput:
    """Sum of the generation loss over the batch's label tokens, and the other objectives where wanted.

    Attributes:
        features: what was contrasted, detached, of all processes; for `TrainingModel.remember`.
    """

    generation_loss_sum: torch.Tensor
    contrast: ContrastResult | None
    features: ContrastFeatures | None = None
    preference: PreferenceResult | None = None


class TrainingModel(nn.Module):
    """A LLaVA model (adapters, if any, already in place) with HACL's heads and queue beside it.

    Args:
        heads: without them there is no contrast.
        preference: its weight is 0 for no preference objective.
        reference: what a preference is measured against, from `frozen_copy`; None takes the model without its
            adapters.
    """

    def __init__(
        self,
        model: LlavaForConditionalGeneration,
        heads: HaclHeads | None = None,
        hacl: HaclConfig | None = None,
        preference: PreferenceConfig | None = None,
        reference: LlavaForConditionalGeneration | None = None,
    ) -> None:
        super().__init__()
        self.model, self.heads, self.hacl = model, heads, hacl or HaclConfig()
        self.preference, self.reference = preference or PreferenceConfig(), reference
        self.queue: NegativeQueue | None = None
        if heads is not None and self.hacl.queue_size:
            self.queue = NegativeQueue(self.hacl.queue_size, heads.output_size)
        eos_token_id = model.generation_config.eos_token_id
        self.eos_token_id = eos_token_id[0] if isinstance(eos_token_id, list) else eos_token_id
        self.label_loss = LabelLoss()

    def forward(self, batch: Batch | PackedRow) -> StepOutput:
        """See `Batch` and `PackedRow` for the shapes.

        With several processes, each runs the same modules in the same order, whatever its batch lacks: engines
        exchange weights and gradients as they run.
        """
        idle_preference = num_processes() > 1 and batch.preference is None
        if num_processes() > 1:
            batch = self._filled(batch)
        images_UNH = _project(self.model, batch.image_features)
        if isinstance(batch, PackedRow):
            loss, states = forward_packed(self.model, images_UNH, batch, self.label_loss)
        else:
            loss, states = self._forward_padded(images_UNH, batch)
        preference = None
        if batch.preference is not None and images_UNH is not None and batch.image_features is not None:
            preference = self._preference(images_UNH, batch.image_features, batch.preference, batch.loss_chunk)
            if idle_preference:
                loss, preference = loss + 0 * preference.objective(1.0, 1.0), None
        contrast, features = None, None
        if self.heads is not None:
            contrast, features = self._contrast(self.heads, states, batch.contrast)
        return StepOutput(loss, contrast, features, preference)

    def _filled(self, batch: Batch | PackedRow) -> Batch | PackedRow:
        model, device = self.model, batch.input_ids.device
        width = model.model.multi_modal_projector.linear_1.in_features
        image = torch.zeros(1, num_image_tokens(model), width, dtype=model.dtype)
        filled = batch.filled(image, self.eos_token_id, self.heads is not None, self.preference.weight > 0)
        return filled.to(device)

    def _forward_padded(
        self, images_UNH: torch.Tensor | None, batch: Batch
    ) -> tuple[torch.Tensor, ContrastStates | None]:
        embeddings_BTH = _embed(self.model, batch.input_ids, images_UNH, batch.row_images, batch.image_positions)
        hidden_size = embeddings_BTH.shape[-1]
        hidden = _language_model(self.model, embeddings_BTH).reshape(-1, hidden_size)
        loss = self.label_loss(self.model.lm_head, hidden[batch.label_positions], batch.label_ids, batch.loss_chunk)
        if self.heads is None or batch.contrast is None or images_UNH is None:
            return loss, None
        if batch.readouts is None:
            raise ValueError("a padded contrast needs readouts; see make_readouts")
        return loss, self._contrast_states(images_UNH, batch.contrast, batch.readouts)

    def train(self, mode: bool = True) -> TrainingModel:
        """Switch dropout on or off; the reference never has any."""
        super().train(mode)
        if self.reference is not None:
            self.reference.eval()
        return self

    def remember(self, output: StepOutput) -> None:
        """Put what was contrasted into the queue, if there is one. Call it after the backward pass."""
        if self.queue is not None and output.features is not None:
            self.queue.push(output.features)

    def _contrast(
        self, heads: HaclHeads, states: ContrastStates | None, batch: ContrastBatch | None
    ) -> tuple[ContrastResult | None, ContrastFeatures | None]:
        ranks = num_processes() if self.hacl.gather else 1
        rows = None
        if batch is None or states is None:
            return None, None
        features = _contrast_features(heads, states, batch)
        if ranks > 1:
            features, rows = gather_features(features)
        result = contrastive_loss(
            features,
            heads(),
            self.hacl.negatives,
            None if self.queue is None else self.queue.contents(),
            self.hacl.text_margin,
            rows,
            ranks,
        )
        return result, features.detached()

    def _contrast_states(
        self, images_UNH: torch.Tensor, batch: ContrastBatch, readouts: ReadoutBatch
    ) -> ContrastStates:
        """The last hidden states of [prefix, image, eos] and of [text, eos], run apart from each other."""
        ids_PT = readouts.input_ids.scatter(1, readouts.ends[:, None], self.eos_token_id)
        embeddings_PTH = _embed(self.model, ids_PT, images_UNH, readouts.row_images, readouts.image_positions)
        image_hidden = _language_model(self.model, embeddings_PTH)
        text_hidden = _language_model(self.model, self.model.get_input_embeddings()(batch.text_ids))
        return ContrastStates(_at(image_hidden, readouts.ends), _at(text_hidden, batch.text_ends))

    def _preference(
        self, images_UNH: torch.Tensor, image_features: torch.Tensor, batch: PreferenceBatch, loss_chunk: int
    ) -> PreferenceResult:
        policy = self._log_probabilities(self.model, images_UNH, batch, loss_chunk)
        # After the policy's passes: autocast keeps weights that it has cast, and without gradients they would have no
        # graph.
        with torch.no_grad(), self._reference() as model, contextlib.ExitStack() as stack:
            if batch.documents is not None:
                stack.enter_context(documents_apart(model.model.language_model))
            reference = self._log_probabilities(model, _project(model, image_features), batch, loss_chunk)
        has_elsewhere = torch.zeros(batch.num_pairs, dtype=torch.bool, device=batch.elsewhere.device)
        has_elsewhere[batch.elsewhere] = True
        settings = self.preference
        return preference_loss(policy, reference, has_elsewhere, settings.beta, settings.anchor)

    def _log_probabilities(
        self,
        model: LlavaForConditionalGeneration,
        images_UNH: torch.Tensor | None,
        batch: PreferenceBatch,
        loss_chunk: int,
    ) -> AnswerLogProbabilities:
        embeddings = _embed(model, batch.input_ids, images_UNH, batch.row_images, batch.image_positions)
        options = {}
        if batch.documents is not None:
            options = {"documents": batch.documents, "position_ids": batch.position_ids}
        hidden = _language_model(model, embeddings, **options).reshape(-1, embeddings.shape[-1])
        labels = (hidden[batch.label_positions], batch.label_ids)
        values = self.label_loss(model.lm_head, *labels, loss_chunk, each=True)
        sums = values.new_zeros(len(batch.lengths)).index_add(0, batch.label_rows, values)
        pairs = batch.num_pairs
        elsewhere = values.new_zeros(pairs).index_copy(0, batch.elsewhere, sums[2 * pairs :])
        return AnswerLogProbabilities(sums[:pairs], sums[pairs : 2 * pairs], elsewhere)

    @contextlib.contextmanager
    def _reference(self) -> Iterator[LlavaForConditionalGeneration]:
        if self.reference is not None:
            yield self.reference
            return
        training = self.model.training
        self.model.eval()
        try:
            with without_adapters(self.model):
                yield self.model
        finally:
            self.model.train(training)


def frozen_copy(model: LlavaForConditionalGeneration) -> LlavaForConditionalGeneration:
    """The model as it is now: parameters that require gradients are copied, all others shared."""
    shared = {id(parameter): parameter for parameter in model.parameters() if not parameter.requires_grad}
    return copy.deepcopy(model, shared).requires_grad_(False).eval()


def _project(model: LlavaForConditionalGeneration, features: torch.Tensor | None) -> torch.Tensor | None:
    """Vision features (U, num_image_tokens, vision hidden size) as the language model reads them."""
    if features is None:
        return None
    # Read by the iterator: under ZeRO-3, to name a weight is to fetch it.
    dtype = next(model.get_input_embeddings().parameters()).dtype
    return model.model.multi_modal_projector(features.to(dtype)).to(dtype)


def _embed(
    model: LlavaForConditionalGeneration,
    input_ids: torch.Tensor,
    images_UNH: torch.Tensor | None,
    row_images: torch.Tensor,
    image_positions: torch.Tensor,
) -> torch.Tensor:
    """Embed right-padded rows (B, T), the images of `row_images` at their positions: (B, T, H)."""
    embeddings_BTH = model.get_input_embeddings()(input_ids)
    if images_UNH is None:
        return embeddings_BTH
    hidden_size = embeddings_BTH.shape[-1]
    flat = embeddings_BTH.reshape(-1, hidden_size)
    rows = images_UNH[row_images].reshape(-1, hidden_size)
    return flat.index_copy(0, image_positions, rows).view_as(embeddings_BTH)


def _language_model(model: LlavaForConditionalGeneration, embeddings: torch.Tensor, **options: Any) -> torch.Tensor:
    hidden: torch.Tensor = model.model.language_model(
        inputs_embeds=embeddings, use_cache=False, **options
    ).last_hidden_state
    return hidden


def _at(hidden_RTH: torch.Tensor, positions_R: torch.Tensor) -> torch.Tensor:
    """Each row's state at its position: (R, H)."""
    return hidden_RTH[torch.arange(len(hidden_RTH), device=hidden_RTH.device), positions_R]


def _contrast_features(heads: HaclHeads, states: ContrastStates, batch: ContrastBatch) -> ContrastFeatures:
    num_images, num_slots = batch.hallucinated_valid.shape
    texts = heads.embed_texts(states.texts)
    shape = (num_images, num_slots, texts.shape[-1])
    num_lies = num_images * num_slots
    truth = None
    if len(batch.truth_slots):
        truths = texts[num_images + num_lies :]
        truth = texts.new_zeros(num_lies, shape[-1]).index_copy(0, batch.truth_slots, truths).view(shape)
    return ContrastFeatures.of(
        heads.embed_images(states.images),
        texts[:num_images],
        texts[num_images : num_images + num_lies].view(shape),
        valid=batch.valid,
        hallucinated_valid=batch.hallucinated_valid,
        caption_group=batch.caption_groups,
        hallucinated_group=batch.hallucinated_groups,
        hallucinated_type=batch.hallucinated_types,
        truth=truth,
        truth_valid=batch.truth_valid,
        truth_group=batch.truth_groups,
    )
