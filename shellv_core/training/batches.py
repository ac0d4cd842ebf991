"""The order of an epoch and the batches in it, as pure functions.

An epoch is a function of (lengths, batch size, seed, epoch): a permutation, cut into windows that are sorted by length,
so that conversations of similar length share a batch and little is padded. To resume takes one integer, the step.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from shellv_core.training.examples import NO_IMAGE, Examples

WINDOW_BATCHES = 32
IGNORE_INDEX = -100


@dataclass(frozen=True)
class ContrastBatch:
    """What the contrastive objective compares: P images with captions, K hallucinated captions each.

    Attributes:
        images: (P,) rows of the batch's image features.
        text_ids: (P + P * K, length), captions first, then each image's hallucinated captions, padded.
        text_ends: (P + P * K,) position of each text's end-of-text token.
        caption_groups: (P,); hallucinated_groups, hallucinated_valid: (P, K).
    """

    images: torch.Tensor
    text_ids: torch.Tensor
    text_ends: torch.Tensor
    caption_groups: torch.Tensor
    hallucinated_groups: torch.Tensor
    hallucinated_valid: torch.Tensor

    def to(self, device: torch.device) -> ContrastBatch:
        """Copy to `device`."""
        return ContrastBatch(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class Batch:
    """One forward pass: B conversations about U images.

    Attributes:
        input_ids: (B, T), right-padded.
        image_features: (U, num_image_tokens, vision hidden size), or None for text only.
        row_images: (R,) for each conversation with an image, its row in `image_features`.
        image_positions: (R * num_image_tokens,) where the image tokens stand in the flattened `input_ids`.
        label_positions: (L,) positions in the flattened `input_ids` whose next token is learned.
        label_ids: (L,) these next tokens.
        num_tokens: tokens without padding.
    """

    input_ids: torch.Tensor
    image_features: torch.Tensor | None
    row_images: torch.Tensor
    image_positions: torch.Tensor
    label_positions: torch.Tensor
    label_ids: torch.Tensor
    num_tokens: int
    contrast: ContrastBatch | None

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.input_ids)

    @property
    def num_slots(self) -> int:
        """Tokens with padding."""
        return self.input_ids.numel()

    def to(self, device: torch.device) -> Batch:
        """Copy to `device`."""
        return Batch(
            **{name: value.to(device) if hasattr(value, "to") else value for name, value in vars(self).items()}
        )


def plan_epoch(lengths: np.ndarray, batch_size: int, seed: int, epoch: int) -> list[np.ndarray]:
    """The rows of each step of an epoch; every row occurs once, the last batch may be smaller."""
    generator = np.random.default_rng([seed, epoch])
    order = generator.permutation(len(lengths))
    batches = []
    window = batch_size * WINDOW_BATCHES
    for start in range(0, len(order), window):
        rows = order[start : start + window]
        rows = rows[np.argsort(lengths[rows], kind="stable")]
        pieces = [rows[at : at + batch_size] for at in range(0, len(rows), batch_size)]
        batches += [pieces[index] for index in generator.permutation(len(pieces))]
    return batches


def steps_per_epoch(num_rows: int, batch_size: int) -> int:
    """Optimizer steps of one epoch."""
    return -(-num_rows // batch_size)


def batch_images(examples: Examples, rows: np.ndarray) -> np.ndarray:
    """The images that `rows` speak of, each once, in rising order: (U,)."""
    images = np.unique(examples.image_index[rows])
    return images[images != NO_IMAGE]


def make_batch(
    examples: Examples,
    rows: np.ndarray,
    image_features: torch.Tensor | None,
    image_token_id: int,
    pad_token_id: int,
    num_hallucinated: int | None = None,
    turn: int = 0,
) -> Batch:
    """Put `rows` into one batch.

    Args:
        image_features: those of `batch_images(examples, rows)`.
        num_hallucinated: hallucinated captions per image in the contrast; None for no contrast.
        turn: decides, with the image's index, which of its hallucinated captions come now; they take turns as it
            counts up.
    """
    input_ids = examples.input_ids.padded(rows, pad_token_id)
    labels = examples.labels.padded(rows, IGNORE_INDEX)
    targets = np.full_like(labels, IGNORE_INDEX)
    targets[:, :-1] = labels[:, 1:]
    label_positions = np.flatnonzero(targets != IGNORE_INDEX)
    # Padding may have the id of any token; an image token counts only inside its row.
    inside = np.arange(input_ids.shape[1])[None, :] < examples.input_ids.lengths[rows][:, None]
    image_positions = np.flatnonzero((input_ids == image_token_id) & inside)
    images = batch_images(examples, rows)
    with_image = examples.image_index[rows]
    with_image = with_image[with_image != NO_IMAGE]
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        image_features=image_features,
        row_images=torch.from_numpy(np.searchsorted(images, with_image)),
        image_positions=torch.from_numpy(image_positions),
        label_positions=torch.from_numpy(label_positions),
        label_ids=torch.from_numpy(targets.reshape(-1)[label_positions]),
        num_tokens=int(examples.input_ids.lengths[rows].sum()),
        contrast=None
        if num_hallucinated is None
        else make_contrast(examples, images, pad_token_id, num_hallucinated, turn),
    )


def count_label_tokens(examples: Examples, rows: np.ndarray) -> int:
    """Tokens of `rows` that are learned; the first token of a row has nothing that predicts it."""
    labels = examples.labels.padded(rows, IGNORE_INDEX)
    return int((labels[:, 1:] != IGNORE_INDEX).sum())


def make_contrast(
    examples: Examples, images: np.ndarray, pad_token_id: int, num_hallucinated: int, turn: int
) -> ContrastBatch | None:
    """The contrast of those of `images` that have a caption; None if none has. For `turn` see `make_batch`."""
    kept = np.flatnonzero(examples.captions.lengths[images] > 0)
    if not len(kept):
        return None
    images = images[kept]
    starts = examples.hallucinated_offsets[images]
    counts = examples.hallucinated_offsets[images + 1] - starts
    slots = np.arange(num_hallucinated)[None, :]
    valid = slots < counts[:, None]
    # A row without enough hallucinated captions repeats text 0 there, which `valid` leaves out.
    chosen = np.where(valid, starts[:, None] + (turn + images[:, None] + slots) % np.maximum(counts, 1)[:, None], 0)
    captions = examples.captions.padded(images, pad_token_id)
    lengths = examples.captions.lengths[images]
    if len(examples.hallucinated) and num_hallucinated:
        others = examples.hallucinated.padded(chosen.reshape(-1), pad_token_id)
        lengths = np.concatenate([lengths, examples.hallucinated.lengths[chosen.reshape(-1)]])
        groups = examples.hallucinated_groups[chosen]
    else:
        others = np.zeros((0, 0), dtype=np.int64)
        valid, groups = valid[:, :0], np.zeros((len(images), 0), dtype=np.int64)
    width = max(captions.shape[1], others.shape[1])
    text_ids = np.full((len(captions) + len(others), width), pad_token_id, dtype=np.int64)
    text_ids[: len(captions), : captions.shape[1]] = captions
    text_ids[len(captions) :, : others.shape[1]] = others
    return ContrastBatch(
        images=torch.from_numpy(kept),
        text_ids=torch.from_numpy(text_ids),
        text_ends=torch.from_numpy(np.maximum(lengths - 1, 0)),
        caption_groups=torch.from_numpy(examples.caption_groups[images]),
        hallucinated_groups=torch.from_numpy(groups),
        hallucinated_valid=torch.from_numpy(valid),
    )
