"""One forward pass over a pack: the generation loss and HACL's contrast from one row without padding.

The row holds the pack's documents; then, each a document of its own, the captions and hallucinated captions; then one
end-of-text token per image, the readout. A readout sees its image's first document up to the image's last token, and
nothing sees it, so the document reads as if it were not there. In the padded form that is four passes, of which the one
for the readouts runs the image a second time.

What stands before the image in its first document (a system prompt, the opening of the user's turn), the readout has
seen, as the image's tokens have; so it has in the padded form of `training.model`, which runs it once more.

Answers for a preference are a second row of the same kind, `PackedRow.preference`: the reference runs them alone.

Shapes: N tokens of the row; I images; H hidden size; P images with captions, K hallucinated captions each.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from shellv_core.data.conversation import IGNORE_INDEX
from shellv_core.data.loader import NO_IMAGE, PackedBatch
from shellv_core.errors import TrainingError
from shellv_core.training.attention import ATTENTION_NAME, Documents
from shellv_core.training.batches import LOSS_CHUNK
from shellv_core.training.cross_entropy import LabelLoss
from shellv_core.training.examples import TYPES, Answers, Examples, Ragged, encode_texts, text_groups
from shellv_core.training.pairs import ContrastBatch, ContrastStates, PreferenceBatch

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, PreTrainedTokenizerBase


@dataclass(frozen=True)
class ReadoutPositions:
    """Where the row's states for the contrast stand: images (P,), and texts as `ContrastBatch.text_ids` has them."""

    images: torch.Tensor
    texts: torch.Tensor


@dataclass(frozen=True)
class PackedRow:
    """What `forward_packed` reads.

    Attributes:
        input_ids, position_ids: int64 (N,).
        documents: which tokens see each other.
        image_features: (I, num_image_tokens, vision hidden size), or None for text only.
        image_positions: (n,) image tokens in the row.
        image_tokens: (n,) which row of the flattened projected features, (I * num_image_tokens, H), stands there.
        label_positions: (L,) positions whose next token is learned.
        label_ids: (L,) these next tokens.
        loss_chunk: positions whose logits exist at a time.
        num_samples, num_tokens: conversations, and tokens of them; those of the contrast are not counted.
        num_slots: tokens that the pack had room for.
        contrast: its texts are in the row already; None without.
        readouts: None without contrast.
        preference: packed.
    """

    input_ids: torch.Tensor
    position_ids: torch.Tensor
    documents: Documents
    image_features: torch.Tensor | None
    image_positions: torch.Tensor
    image_tokens: torch.Tensor
    label_positions: torch.Tensor
    label_ids: torch.Tensor
    loss_chunk: int
    num_samples: int
    num_tokens: int
    num_slots: int
    contrast: ContrastBatch | None = None
    readouts: ReadoutPositions | None = None
    preference: PreferenceBatch | None = None

    @classmethod
    def idle(cls, token_id: int) -> PackedRow:
        """A text of one token that teaches nothing."""
        nothing, zero = torch.zeros(0, dtype=torch.int64), torch.zeros(1, dtype=torch.int64)
        documents = Documents((0, 1))
        return cls(zero + token_id, zero, documents, None, nothing, nothing, nothing, nothing, 1, 0, 0, 0)

    def filled(self, image_features: torch.Tensor, token_id: int, contrast: bool, preference: bool) -> PackedRow:
        """With `image_features` and idle objectives in place of what it lacks."""
        values: dict[str, Any] = {}
        if self.image_features is None:
            values["image_features"] = image_features
        if contrast and self.contrast is None:
            # A text of one token, and a readout that sees the row's first.
            end = self.documents.borders[-1]
            values |= {
                "input_ids": torch.cat([self.input_ids, torch.full((2,), token_id)]),
                "position_ids": torch.cat([self.position_ids, torch.tensor([0, 1])]),
                "documents": Documents((*self.documents.borders, end + 1), ((0, 1),)),
                "contrast": ContrastBatch.idle(token_id),
                "readouts": ReadoutPositions(images=torch.tensor([end + 1]), texts=torch.tensor([end])),
            }
        if preference and self.preference is None:
            values["preference"] = PreferenceBatch.idle(token_id).packed()
        return replace(self, **values)

    def to(self, device: torch.device) -> PackedRow:
        """Copy to `device`."""
        values = {name: value.to(device) if hasattr(value, "to") else value for name, value in vars(self).items()}
        if self.readouts is not None:
            values["readouts"] = ReadoutPositions(self.readouts.images.to(device), self.readouts.texts.to(device))
        return PackedRow(**values)


def make_row(
    pack: PackedBatch,
    image_features: torch.Tensor | None,
    image_token_id: int,
    eos_token_id: int,
    contrast: ContrastBatch | None = None,
    loss_chunk: int = LOSS_CHUNK,
    num_slots: int | None = None,
    preference: PreferenceBatch | None = None,
) -> PackedRow:
    """Lay a pack out as a row.

    Args:
        image_features: of the pack's images, in their order.
        eos_token_id: the readout token.
        contrast, preference: of the pack's images, from `pack_examples`.
        num_slots: tokens that the pack had room for; by default as many as it has.
    """
    borders = pack.cu_seqlens.tolist()
    ids, labels = pack.input_ids.numpy(), pack.labels.numpy()
    document_of = np.repeat(np.arange(len(borders) - 1), np.diff(borders))
    image_of = pack.image_index.numpy()[document_of]
    image_positions = np.flatnonzero((ids == image_token_id) & (image_of != NO_IMAGE))
    of_document = document_of[image_positions]
    ordinal = np.arange(len(image_positions)) - np.searchsorted(of_document, of_document)
    per_image = 0 if image_features is None else image_features.shape[1]
    label_positions = np.flatnonzero(labels != IGNORE_INDEX) - 1
    parts, positions = [ids], [pack.position_ids.numpy()]
    spans: list[tuple[int, int]] = []
    readouts = None
    if contrast is not None:
        texts = _texts(contrast)
        parts += texts
        positions += [np.arange(len(text)) for text in texts]
        text_borders = list(itertools.accumulate(map(len, texts), initial=borders[-1]))
        borders = borders + text_borders[1:]
        spans = _image_spans(contrast.images.tolist(), pack, image_positions, of_document)
        parts.append(np.full(len(spans), eos_token_id))
        positions.append(np.asarray([stop - start for start, stop in spans]))
        readouts = ReadoutPositions(
            images=torch.arange(borders[-1], borders[-1] + len(spans)),
            texts=torch.tensor(text_borders[1:]) - 1,
        )
    return PackedRow(
        input_ids=torch.from_numpy(np.concatenate(parts)),
        position_ids=torch.from_numpy(np.concatenate(positions)),
        documents=Documents(tuple(borders), tuple(spans)),
        image_features=image_features,
        image_positions=torch.from_numpy(image_positions),
        image_tokens=torch.from_numpy(image_of[image_positions] * per_image + ordinal),
        label_positions=torch.from_numpy(label_positions),
        label_ids=torch.from_numpy(labels[label_positions + 1]),
        loss_chunk=loss_chunk,
        num_samples=len(pack.keys),
        num_tokens=len(ids),
        num_slots=len(ids) if num_slots is None else num_slots,
        contrast=contrast,
        readouts=readouts,
        preference=None if preference is None else preference.packed(),
    )


def pack_examples(
    pack: PackedBatch,
    tokenizer: PreTrainedTokenizerBase,
    encode_answers: Callable[[Sequence[Sequence[str]]], Answers] | None = None,
) -> Examples:
    """A pack's captions and hallucinated captions, for `make_contrast` and `make_preference`; no conversations.

    Args:
        encode_answers: of captions, hallucinated captions and their truths; for a preference.
    """
    captions = [caption or "" for caption in pack.captions]
    lies = [items if caption else () for caption, items in zip(captions, pack.hallucinated, strict=True)]
    every = [item for items in lies for item in items]
    told, true = [item.text for item in every], [item.truth for item in every]
    nothing = np.zeros(0, dtype=np.int64)
    return Examples(
        input_ids=Ragged.of([]),
        labels=Ragged.of([]),
        image_index=nothing,
        captions=Ragged.of(encode_texts(tokenizer, captions)),
        caption_groups=text_groups(captions),
        hallucinated=Ragged.of(encode_texts(tokenizer, told)),
        hallucinated_groups=text_groups(told),
        hallucinated_offsets=np.cumsum([0, *map(len, lies)], dtype=np.int64),
        hallucinated_types=np.asarray([TYPES.index(item.type) for item in every], dtype=np.int64),
        truths=Ragged.of(encode_texts(tokenizer, true)),
        truth_groups=text_groups(true),
        answers=None if encode_answers is None else encode_answers((captions, told, true)),
    )


def forward_packed(
    model: LlavaForConditionalGeneration, images_ITH: torch.Tensor | None, row: PackedRow, label_loss: LabelLoss
) -> tuple[torch.Tensor, ContrastStates | None]:
    """The sum of the generation loss over the row's labels, and the states of its contrast.

    Args:
        images_ITH: the row's image features, projected.

    Raises:
        TrainingError: outside of `attention.documents_apart`.
    """
    language_model = model.model.language_model
    if language_model.config._attn_implementation != ATTENTION_NAME:
        raise TrainingError(
            f"the language model's attention is {language_model.config._attn_implementation!r}, under which packed"
            " documents would see each other; train within documents_apart(language_model)."
        )
    embeddings_NH = model.get_input_embeddings()(row.input_ids)
    if images_ITH is not None:
        images_nH = images_ITH.flatten(0, 1)[row.image_tokens]
        embeddings_NH = embeddings_NH.index_copy(0, row.image_positions, images_nH)
    hidden_NH = language_model(
        inputs_embeds=embeddings_NH[None],
        position_ids=row.position_ids[None],
        documents=row.documents,
        use_cache=False,
    ).last_hidden_state[0]
    loss = label_loss(model.lm_head, hidden_NH[row.label_positions], row.label_ids, row.loss_chunk)
    if row.readouts is None:
        return loss, None
    return loss, ContrastStates(hidden_NH[row.readouts.images], hidden_NH[row.readouts.texts])


def _texts(contrast: ContrastBatch) -> list[np.ndarray]:
    """The texts without padding; of a slot without a hallucinated caption its first token, as something must stand."""
    ends = contrast.text_ends.numpy().copy()
    num_images, num_hallucinated = contrast.hallucinated_valid.shape
    slots = slice(num_images, num_images * (1 + num_hallucinated))
    ends[slots] = np.where(contrast.hallucinated_valid.flatten().numpy(), ends[slots], 0)
    return [ids[: end + 1] for ids, end in zip(contrast.text_ids.numpy(), ends, strict=True)]


def _image_spans(
    images: Sequence[int], pack: PackedBatch, image_positions: np.ndarray, of_document: np.ndarray
) -> list[tuple[int, int]]:
    """For each image its first document, from the start to the image's last token."""
    index, borders = pack.image_index.tolist(), pack.cu_seqlens.tolist()
    spans = []
    for image in images:
        document = index.index(image)
        last = image_positions[np.searchsorted(of_document, document, side="right") - 1]
        spans.append((borders[document], int(last) + 1))
    return spans
