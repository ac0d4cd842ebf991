"""Useful floating-point operations of training, and what a device could do at most.

Useful is what the objectives need: tokens without padding, a causal token's view of those before it, the vocabulary's
logits at labelled positions, the vision tower forward where its features are not cached; nothing that is computed a
second time. A weight takes 2 operations per token forward, 2 for the gradient of its input, and 2 for its own where it
learns: 6 in all, 4 where it is frozen (LoRA's base, the language model while the projector alone learns).

Counted from the model as it stands, so build the formula when adapters are in place and it is settled what learns.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from shellv_core.training.batches import Batch
from shellv_core.training.packed import PackedRow

if TYPE_CHECKING:
    from shellv_core.training.model import TrainingModel
    from shellv_core.training.pairs import ContrastBatch, PreferenceBatch

M = TypeVar("M", bound=nn.Module)
TERA = 1e12
#: Operations a second in bfloat16 without sparsity, by a part of the device's name; the first that matches counts.
#: Sources: NVIDIA's data sheets.
PEAKS = {
    "H100 PCIe": 756.5 * TERA,
    "H100 NVL": 835.5 * TERA,
    "H100": 989.5 * TERA,
    "H800": 989.5 * TERA,
    "H200": 989.5 * TERA,
    "A100": 312 * TERA,
    "A800": 312 * TERA,
    "B200": 2250 * TERA,
    "L40S": 362 * TERA,
    "L4": 121 * TERA,
}


@dataclass(frozen=True)
class Flops:
    """Useful operations of forward and backward passes.

    Attributes:
        language_model: the layers' weights, on the tokens of conversations.
        attention: of these tokens among each other.
        head: logits of what is learned.
        projector: of each image.
        vision_tower: forward only.
        contrast, preference: everything of the objectives beside the generation loss.
    """

    language_model: float = 0.0
    attention: float = 0.0
    head: float = 0.0
    projector: float = 0.0
    vision_tower: float = 0.0
    contrast: float = 0.0
    preference: float = 0.0

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())


class FlopFormula:
    """Useful operations of a model's training, from counts of tokens.

    Args:
        module: as it is trained.
        tower_runs: whether the vision tower runs in every step; false where its features are cached.
    """

    def __init__(self, module: TrainingModel, tower_runs: bool) -> None:
        model = module.model
        text: Any = model.config.text_config
        head_size = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.attention_size = text.num_attention_heads * head_size * text.num_hidden_layers
        self.window = getattr(text, "sliding_window", None)
        layers = _linears(model.model.language_model)
        self.per_token = sum(_operations(each, 3 if _learns(each) else 2) for each in layers)
        # For a preference's reference: where adapters learn, it is the model without them.
        whole = module.reference is not None
        self.per_token_forward = sum(_operations(each, 1) for each in layers if whole or not _learns(each))
        head = _linears(model.lm_head)
        self.per_label = sum(_operations(each, 3 if _learns(each) else 2) for each in head)
        self.per_label_forward = sum(_operations(each, 1) for each in head)
        self.per_image = _chain(_linears(model.model.multi_modal_projector)) * model.config.image_seq_length
        self.per_state = 0 if module.heads is None else 3 * _operations_of(module.heads.vision_projector)
        self.per_picture = _tower_operations(model) if tower_runs else 0

    def of(self, batch: Batch | PackedRow) -> Flops:
        """Forward and backward of a batch or pack; of a padded batch's rows all count as equally long."""
        images = 0 if batch.image_features is None else len(batch.image_features)
        contrast = preference = 0.0
        lengths: list[float]
        if isinstance(batch, PackedRow):
            lengths = [*batch.documents.lengths]
            num_documents = batch.documents.borders.index(batch.num_tokens)
            if batch.readouts is not None:
                spans = [stop - start + 1 for start, stop in batch.documents.spans]
                contrast = self._contrast(lengths[num_documents:], spans)
            lengths = lengths[:num_documents]
        else:
            lengths = [batch.num_tokens / max(batch.num_samples, 1)] * batch.num_samples
            if batch.contrast is not None and batch.readouts is not None:
                seen = (batch.readouts.ends + 1).tolist()
                contrast = self._contrast(_text_lengths(batch.contrast), seen)
        if batch.preference is not None:
            preference = self._preference(batch.preference)
        return Flops(
            language_model=self.per_token * batch.num_tokens,
            attention=3 * self.attention(lengths),
            head=self.per_label * len(batch.label_ids),
            projector=self.per_image * images,
            vision_tower=self.per_picture * images,
            contrast=contrast,
            preference=preference,
        )

    def attention(self, lengths: Iterable[float]) -> float:
        """Forward operations of causal attention within documents of these lengths."""
        return sum(4 * self.attention_size * _pairs(length, self.window) for length in lengths)

    def _contrast(self, texts: Sequence[float], readouts: Sequence[float]) -> float:
        """Of texts of these lengths, and readout tokens that see as many others (themselves included)."""
        tokens, states = sum(texts) + len(readouts), len(texts) + len(readouts)
        seen = 4 * self.attention_size * sum(readouts)
        return self.per_token * tokens + 3 * (self.attention(texts) + seen) + self.per_state * states

    def _preference(self, batch: PreferenceBatch) -> float:
        """Of the answers, and of each image's prompt once; forward once more for the reference."""
        documents = batch.documents or batch.packed().documents
        if documents is None:
            return 0.0
        attention = self.attention(documents.lengths)
        for (start, stop), length in zip(documents.spans, documents.branch_lengths, strict=True):
            attention += self.attention([stop - start + length]) - self.attention([stop - start])
        tokens = documents.num_tokens * (self.per_token + self.per_token_forward)
        return tokens + 4 * attention + len(batch.label_ids) * (self.per_label + self.per_label_forward)


def device_peak(device: torch.device) -> float | None:
    """Operations a second that `device` could do at most; None for a GPU that `PEAKS` does not have, and for a CPU.

    Of a CPU no such figure is published, and what it does at a moment depends on what else it does.
    """
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAKS.items() if part in name), None)


def without_data(module: M) -> M:
    """A copy on the meta device: shapes and types only."""
    memo: dict[int, Any] = {
        id(each): nn.Parameter(torch.empty_like(each, device="meta"), each.requires_grad)
        for each in module.parameters()
    }
    memo |= {id(each): torch.empty_like(each, device="meta") for each in module.buffers()}
    return copy.deepcopy(module, memo)


def _tower_operations(model: Any) -> float:
    tower, size = without_data(model.model.vision_tower), model.config.vision_config.image_size
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        tower(torch.zeros(1, 3, size, size, dtype=tower.dtype, device="meta"))
    return float(counter.get_total_flops())


def _linears(module: nn.Module) -> list[nn.Module]:
    """Matrices of a part, in the order of their names; adapters' included, PEFT's unused originals not."""
    return [
        each
        for name, each in module.named_modules()
        if isinstance(each, nn.Linear) and "original_module" not in name.split(".")
    ]


def _learns(linear: Any) -> bool:
    return bool(linear.weight.requires_grad)


def _operations(linear: Any, times: int) -> int:
    # Not the weight's own size: quantized ones are packed.
    return int(2 * linear.in_features * linear.out_features * times)


def _operations_of(head: nn.Module) -> int:
    return _operations(head, 1) if isinstance(head, nn.Linear) else 0


def _chain(linears: list[nn.Module]) -> int:
    """Per token, forward and backward, of matrices one behind another whose input does not learn."""
    total, needed = 0, False
    for each in linears:
        total += _operations(each, 1 + needed + _learns(each))
        needed = needed or _learns(each)
    return total


def _pairs(length: float, window: int | None) -> float:
    """Pairs of a token and one that it sees."""
    seen = length if window is None else min(length, window)
    return seen * (seen + 1) / 2 + (length - seen) * seen


def _text_lengths(contrast: ContrastBatch) -> list[int]:
    lengths = contrast.text_ends + 1
    num_images, slots = contrast.hallucinated_valid.shape
    valid = torch.ones_like(lengths, dtype=torch.bool)
    valid[num_images : num_images * (1 + slots)] = contrast.hallucinated_valid.flatten()
    kept: list[int] = lengths[valid].tolist()
    return kept
