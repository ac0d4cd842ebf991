"""Captions beside hallucinated captions (lies): what the contrastive and the preference objective read of a batch.

An image's lies take turns, from step to step, and both objectives take the same. Where a text ends is known from its
length and never searched for: padding may have the id of the end-of-text token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from shellv_core.training.attention import Documents
from shellv_core.training.examples import Examples, Ragged


@dataclass(frozen=True)
class ContrastBatch:
    """What the contrastive objective compares: P images with captions, K slots for lies each, U lies' own truths.

    Attributes:
        images: (P,) rows of the batch's image features.
        text_ids: (P + P * K + U, length), captions first, then each image's lies, then truths, padded.
        text_ends: (P + P * K + U,) position of each text's end-of-text token.
        truth_slots: (U,) the slot of the P * K that a truth belongs to.
        caption_groups: (P,).
        hallucinated_groups, hallucinated_types, hallucinated_valid, truth_groups, truth_valid: (P, K).
        valid: (P,) bool, False for what is there only so that all processes compute the same; None: all are.
    """

    images: torch.Tensor
    text_ids: torch.Tensor
    text_ends: torch.Tensor
    truth_slots: torch.Tensor
    caption_groups: torch.Tensor
    hallucinated_groups: torch.Tensor
    hallucinated_types: torch.Tensor
    hallucinated_valid: torch.Tensor
    truth_groups: torch.Tensor
    truth_valid: torch.Tensor
    valid: torch.Tensor | None = None

    @classmethod
    def idle(cls, token_id: int) -> ContrastBatch:
        """One image, the batch's first, and a text of one token; neither counts."""
        none = torch.zeros(1, 0, dtype=torch.int64)
        return cls(
            images=torch.zeros(1, dtype=torch.int64),
            text_ids=torch.full((1, 1), token_id),
            text_ends=torch.zeros(1, dtype=torch.int64),
            truth_slots=none[0],
            caption_groups=torch.zeros(1, dtype=torch.int64),
            hallucinated_groups=none,
            hallucinated_types=none,
            hallucinated_valid=none.bool(),
            truth_groups=none,
            truth_valid=none.bool(),
            valid=torch.zeros(1, dtype=torch.bool),
        )

    def to(self, device: torch.device) -> ContrastBatch:
        """Copy to `device`."""
        values: dict[str, Any] = {
            name: None if value is None else value.to(device) for name, value in vars(self).items()
        }
        return ContrastBatch(**values)


@dataclass(frozen=True)
class ReadoutBatch:
    """The rows of a contrast's images in padded form: P times the beginning of a conversation up to the image's end.

    Attributes:
        input_ids: (P, T), right-padded.
        row_images: (P,) each row's image, a row of the batch's image features.
        image_positions: (P * num_image_tokens,) in the flattened `input_ids`.
        ends: (P,) the position behind the image, where the readout token stands.
    """

    input_ids: torch.Tensor
    row_images: torch.Tensor
    image_positions: torch.Tensor
    ends: torch.Tensor

    @classmethod
    def idle(cls, token_id: int) -> ReadoutBatch:
        """One row without an image."""
        nothing = torch.zeros(0, dtype=torch.int64)
        return cls(torch.full((1, 1), token_id), nothing, nothing, torch.zeros(1, dtype=torch.int64))

    def to(self, device: torch.device) -> ReadoutBatch:
        """Copy to `device`."""
        return ReadoutBatch(**{name: value.to(device) for name, value in vars(self).items()})


@dataclass(frozen=True)
class ContrastStates:
    """Last hidden states of a contrast: images (P, H), and texts (P + P * K + U, H) as `ContrastBatch.text_ids`."""

    images: torch.Tensor
    texts: torch.Tensor


@dataclass(frozen=True)
class PreferenceBatch:
    """P pairs of a caption (or truth) and a lie as answers to the prompt, R rows.

    Rows are the P captions, the P lies, and the captions of `elsewhere` pairs once more, with another image.

    Attributes:
        input_ids: (R, T), right-padded; packed (1, N), prompts one behind another, then answers.
        lengths: (R,) tokens of each row.
        prompt_length: tokens of the prompt, with which each row begins.
        row_images: (R,) each row's image, a row of the batch's image features; packed, each prompt's.
        image_positions: (len(row_images) * num_image_tokens,) in the flattened `input_ids`.
        label_positions: (L,) positions in the flattened `input_ids` whose next token is of the answer.
        label_ids, label_rows: (L,) these next tokens, and their rows.
        elsewhere: (E,) pairs for which the batch has another image.
        position_ids: (1, N), if packed.
        documents: prompts, and answers as their branches, if packed.
    """

    input_ids: torch.Tensor
    lengths: torch.Tensor
    prompt_length: int
    row_images: torch.Tensor
    image_positions: torch.Tensor
    label_positions: torch.Tensor
    label_ids: torch.Tensor
    label_rows: torch.Tensor
    elsewhere: torch.Tensor
    position_ids: torch.Tensor | None = None
    documents: Documents | None = None

    @classmethod
    def idle(cls, token_id: int) -> PreferenceBatch:
        """One pair of texts of one token, of which nothing counts."""
        none = torch.zeros(0, dtype=torch.int64)
        return cls(
            torch.full((2, 1), token_id), torch.ones(2, dtype=torch.int64), 1, none, none, none, none, none, none
        )

    @property
    def num_pairs(self) -> int:
        """P."""
        return (len(self.lengths) - len(self.elsewhere)) // 2

    def packed(self) -> PreferenceBatch:
        """Without padding, and each image's prompt once: answers to it are branches, which do not see each other."""
        width, length = self.input_ids.shape[1], self.prompt_length
        images, prompts = self.row_images.unique(return_inverse=True)
        if not len(images):
            prompts = torch.zeros_like(self.lengths)
        num_prompts = max(len(images), 1)
        columns = torch.arange(width).expand_as(self.input_ids)
        # The last token of an answer is learned and predicts nothing.
        answers = (columns >= length) & (columns < self.lengths[:, None] - 1)
        behind = num_prompts * length + answers.flatten().cumsum(0).view_as(columns) - 1
        place = torch.where(columns < length, prompts[:, None] * length + columns, behind)
        image_columns = self.image_positions.view(len(self.lengths), -1)[0] % width
        starts, tails = (prompts * length).tolist(), answers.sum(1).tolist()
        return replace(
            self,
            input_ids=torch.cat([self.input_ids[0, :length].repeat(num_prompts), self.input_ids[answers]])[None],
            row_images=images,
            image_positions=(torch.arange(num_prompts)[:, None] * length + image_columns).flatten(),
            label_positions=place.flatten()[self.label_positions],
            position_ids=torch.cat([torch.arange(length).repeat(num_prompts), columns[answers]])[None],
            documents=Documents(
                tuple(range(0, num_prompts * length + 1, length)),
                tuple((start, start + length) for start, tail in zip(starts, tails, strict=True) if tail),
                tuple(filter(None, tails)),
            ),
        )

    def to(self, device: torch.device) -> PreferenceBatch:
        """Copy to `device`."""
        return PreferenceBatch(
            **{name: value.to(device) if hasattr(value, "to") else value for name, value in vars(self).items()}
        )


def make_contrast(
    examples: Examples, images: np.ndarray, pad_token_id: int, num_hallucinated: int, turn: int, truths: bool
) -> ContrastBatch | None:
    """The contrast of those of `images` that have a caption; None if none has.

    Args:
        turn: see `make_batch`.
        truths: take the lies' own truths along; without it they count as lies that have none.
    """
    kept = np.flatnonzero(examples.captions.lengths[images] > 0)
    if not len(kept):
        return None
    images = images[kept]
    chosen, valid = _turns(examples, images, num_hallucinated if len(examples.hallucinated) else 0, turn)
    has_truth = valid & truths & (examples.truths.lengths[chosen] > 0)
    truth_slots = np.flatnonzero(has_truth)
    parts = [
        (examples.captions, images),
        (examples.hallucinated, chosen.reshape(-1)),
        (examples.truths, chosen.reshape(-1)[truth_slots]),
    ]
    return ContrastBatch(
        images=torch.from_numpy(kept),
        text_ids=torch.from_numpy(_stacked([each.padded(rows, pad_token_id) for each, rows in parts], pad_token_id)),
        text_ends=torch.from_numpy(np.maximum(np.concatenate([each.lengths[rows] for each, rows in parts]) - 1, 0)),
        truth_slots=torch.from_numpy(truth_slots),
        caption_groups=torch.from_numpy(examples.caption_groups[images]),
        hallucinated_groups=torch.from_numpy(examples.hallucinated_groups[chosen]),
        hallucinated_types=torch.from_numpy(examples.hallucinated_types[chosen]),
        hallucinated_valid=torch.from_numpy(valid),
        truth_groups=torch.from_numpy(examples.truth_groups[chosen]),
        truth_valid=torch.from_numpy(has_truth),
    )


def make_readouts(
    input_ids: np.ndarray, image_positions: np.ndarray, row_images: np.ndarray, images: np.ndarray, pad_token_id: int
) -> ReadoutBatch:
    """The readouts of `images`, each behind the beginning of its first conversation.

    Args:
        input_ids: (B, T), right-padded conversations.
        image_positions: (R, num_image_tokens) in the flattened `input_ids`, of the conversations with an image.
        row_images: (R,) these conversations' images, rows of the batch's image features.
        images: (P,) rows of the batch's image features.
    """
    width = input_ids.shape[1]
    known, firsts = np.unique(row_images, return_index=True)
    positions = image_positions[firsts[np.searchsorted(known, images)]]
    columns = positions % width
    ends = columns.max(axis=1) + 1
    length = int(ends.max()) + 1
    begun = np.pad(input_ids[positions[:, 0] // width], ((0, 0), (0, 1)))[:, :length]
    inside = np.arange(length)[None, :] < ends[:, None]
    places = np.arange(len(images))[:, None] * length + columns
    return ReadoutBatch(
        input_ids=torch.from_numpy(np.where(inside, begun, pad_token_id)),
        row_images=torch.from_numpy(images),
        image_positions=torch.from_numpy(places.reshape(-1)),
        ends=torch.from_numpy(ends),
    )


def make_preference(
    examples: Examples, images: np.ndarray, image_token_id: int, pad_token_id: int, turn: int
) -> PreferenceBatch | None:
    """The pairs of those of `images` that have a caption and a lie that says something else; None without any.

    Another image is the next of `images`, in their order and round again, whose caption is not the same.
    """
    answers = examples.answers
    if answers is None:
        raise ValueError("the examples hold no answers; tokenize them with a prompt")
    if not len(examples.hallucinated):
        return None
    chosen, valid = _turns(examples, images, 1, turn)
    lies, told = chosen[:, 0], valid[:, 0]
    has_truth = examples.truths.lengths[lies] > 0
    groups = np.where(has_truth, examples.truth_groups[lies], examples.caption_groups[images])
    rows = np.flatnonzero(told & (groups != examples.hallucinated_groups[lies]))
    if not len(rows):
        return None
    others = [_other_image(examples.caption_groups[images], int(row)) for row in rows]
    elsewhere = np.asarray([index for index, other in enumerate(others) if other is not None], dtype=np.int64)
    true_texts = [answers.truths.at(lies[row]) if has_truth[row] else answers.captions.at(images[row]) for row in rows]
    texts = [*true_texts, *(answers.hallucinated.at(lies[row]) for row in rows), *(true_texts[at] for at in elsewhere)]
    lengths = np.asarray([len(text) for text in texts])
    prompt_length = len(answers.prompt_ids)
    tails = Ragged.of(texts)
    input_ids = tails.padded(np.arange(len(texts)), pad_token_id)
    input_ids = np.concatenate([np.tile(answers.prompt_ids.astype(np.int64), (len(texts), 1)), input_ids], axis=1)
    label_rows = np.repeat(np.arange(len(texts)), lengths)
    columns = np.arange(len(label_rows)) - np.repeat(tails.offsets[:-1], lengths) + prompt_length
    width = input_ids.shape[1]
    image_columns = np.flatnonzero(answers.prompt_ids == image_token_id)
    row_images = np.concatenate([rows, rows, np.asarray([others[at] for at in elsewhere], dtype=np.int64)])
    return PreferenceBatch(
        input_ids=torch.from_numpy(input_ids),
        lengths=torch.from_numpy(lengths + prompt_length),
        prompt_length=prompt_length,
        row_images=torch.from_numpy(row_images),
        image_positions=torch.from_numpy((np.arange(len(texts))[:, None] * width + image_columns).reshape(-1)),
        label_positions=torch.from_numpy(label_rows * width + columns - 1),
        label_ids=torch.from_numpy(tails.values.astype(np.int64)),
        label_rows=torch.from_numpy(label_rows),
        elsewhere=torch.from_numpy(elsewhere),
    )


def _turns(examples: Examples, images: np.ndarray, num_slots: int, turn: int) -> tuple[np.ndarray, np.ndarray]:
    """Which lies come now: their indices and whether the image has as many, both (len(images), num_slots)."""
    starts = examples.hallucinated_offsets[images]
    counts = examples.hallucinated_offsets[images + 1] - starts
    slots = np.arange(num_slots)[None, :]
    valid = slots < counts[:, None]
    # A row without enough lies repeats text 0 there, which `valid` leaves out.
    chosen = np.where(valid, starts[:, None] + (turn + images[:, None] + slots) % np.maximum(counts, 1)[:, None], 0)
    return chosen, valid


def _other_image(groups: np.ndarray, row: int) -> int | None:
    order = (row + 1 + np.arange(len(groups) - 1)) % len(groups)
    different = order[groups[order] != groups[row]]
    return int(different[0]) if len(different) else None


def _stacked(blocks: list[np.ndarray], fill: int) -> np.ndarray:
    """Blocks of rows under each other, right-padded to one width."""
    width = max(block.shape[1] for block in blocks)
    result = np.full((sum(map(len, blocks)), width), fill, dtype=np.int64)
    start = 0
    for block in blocks:
        result[start : start + len(block), : block.shape[1]] = block
        start += len(block)
    return result
