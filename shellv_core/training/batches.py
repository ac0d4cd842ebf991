"""The order of an epoch and the batches in it, as pure functions.

An epoch is a function of (lengths, batch size, seed, epoch): a permutation, cut into windows that are sorted by length,
so that conversations of similar length share a batch and little is padded. To resume takes one integer, the step.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from shellv_core.data.conversation import IGNORE_INDEX
from shellv_core.training.examples import NO_IMAGE, Examples
from shellv_core.training.pairs import (
    ContrastBatch,
    PreferenceBatch,
    ReadoutBatch,
    make_contrast,
    make_preference,
    make_readouts,
)

WINDOW_BATCHES = 32
#: Positions whose logits exist at a time, unless told otherwise.
LOSS_CHUNK = 1024


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
        readouts: of the contrast's images.
        loss_chunk: positions whose logits exist at a time.
    """

    input_ids: torch.Tensor
    image_features: torch.Tensor | None
    row_images: torch.Tensor
    image_positions: torch.Tensor
    label_positions: torch.Tensor
    label_ids: torch.Tensor
    num_tokens: int
    contrast: ContrastBatch | None
    preference: PreferenceBatch | None = None
    readouts: ReadoutBatch | None = None
    loss_chunk: int = LOSS_CHUNK

    @property
    def num_samples(self) -> int:
        """B."""
        return len(self.input_ids)

    @property
    def num_slots(self) -> int:
        """Tokens with padding."""
        return self.input_ids.numel()

    def filled(self, image_features: torch.Tensor, token_id: int, contrast: bool, preference: bool) -> Batch:
        """With a text that teaches nothing, `image_features` and idle objectives in place of what it lacks."""
        nothing = torch.zeros(0, dtype=torch.int64)
        values: dict[str, Any] = {}
        if not len(self.input_ids):
            values |= {"input_ids": torch.full((1, 1), token_id)}
        if self.image_features is None:
            values |= {"image_features": image_features, "row_images": nothing, "image_positions": nothing}
        if contrast and self.contrast is None:
            values |= {"contrast": ContrastBatch.idle(token_id), "readouts": ReadoutBatch.idle(token_id)}
        if preference and self.preference is None:
            values["preference"] = PreferenceBatch.idle(token_id)
        return replace(self, **values)

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


def split_rows(examples: Examples, rows: np.ndarray, num_processes: int) -> list[np.ndarray]:
    """The rows that each of several processes computes: as many each, by rising image, so that an image's are close."""
    if num_processes == 1:
        return [rows]
    rows = rows[np.argsort(examples.image_index[rows], kind="stable")]
    return np.array_split(rows, num_processes)


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
    truths: bool = False,
    preference: bool = False,
    contrasted: np.ndarray | None = None,
    loss_chunk: int = LOSS_CHUNK,
) -> Batch:
    """Put `rows` into one batch.

    Args:
        image_features: those of `batch_images(examples, rows)`.
        num_hallucinated: hallucinated captions per image in the contrast; None for no contrast.
        turn: decides, with the image's index, which of its hallucinated captions come now; they take turns as it
            counts up.
        truths: let the contrast have the hallucinated captions' own truths.
        preference: add pairs for the preference objective; the examples must hold answers.
        contrasted: which of the images the contrast is of; None for all.
        loss_chunk: positions whose logits exist at a time.
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
    row_images = np.searchsorted(images, with_image[with_image != NO_IMAGE])
    contrast = readouts = None
    if num_hallucinated is not None:
        chosen = images if contrasted is None else contrasted
        contrast = make_contrast(examples, chosen, pad_token_id, num_hallucinated, turn, truths)
        if contrast is not None:
            rows_of_features = torch.from_numpy(np.searchsorted(images, chosen))
            contrast = replace(contrast, images=rows_of_features[contrast.images])
            each_row = image_positions.reshape(len(row_images), -1)
            readouts = make_readouts(input_ids, each_row, row_images, contrast.images.numpy(), pad_token_id)
    return Batch(
        input_ids=torch.from_numpy(input_ids),
        image_features=image_features,
        row_images=torch.from_numpy(row_images),
        image_positions=torch.from_numpy(image_positions),
        label_positions=torch.from_numpy(label_positions),
        label_ids=torch.from_numpy(targets.reshape(-1)[label_positions]),
        num_tokens=int(examples.input_ids.lengths[rows].sum()),
        contrast=contrast,
        preference=make_preference(examples, images, image_token_id, pad_token_id, turn) if preference else None,
        readouts=readouts,
        loss_chunk=loss_chunk,
    )


def count_label_tokens(examples: Examples, rows: np.ndarray) -> int:
    """Tokens of `rows` that are learned; the first token of a row has nothing that predicts it."""
    labels = examples.labels.padded(rows, IGNORE_INDEX)
    return int((labels[:, 1:] != IGNORE_INDEX).sum())
