"""HACL's contrastive objective as pure functions of embeddings.

Shapes: B images with one caption each, K hallucinated captions per image, D dimensions. With v, t, h the L2-normalized
embeddings of images, captions and hallucinated captions, and T the temperature::

    i2t = -log exp(v_i.t_i / T) / (sum_j exp(v_i.t_j / T) + sum of exp(v_i.h / T))
    t2i = -log exp(t_i.v_i / T) / (sum_j exp(t_i.v_j / T))

The sum over h is over the image's own hallucinated captions ("paired", as printed in the paper) or over those of the
whole batch ("batch", as in the released code). Hallucinated captions have no image, so t2i does not see them.

Source: Hallucination Augmented Contrastive Learning, arXiv:2312.06968; X-PLUG/mPLUG-HalOwl@63863fc hacl/.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch.nn import functional

NegativeMode = Literal["paired", "batch"]


@dataclass(frozen=True)
class ContrastiveResult:
    """Mean losses over the valid rows (scalars; zero without any), and the same figures' detached metrics.

    Attributes:
        image_to_text, text_to_image: the two losses.
        retrieval_accuracy: share of images whose own caption scores highest among all texts in their contrast.
        hallucination_margin: mean of cos(v, t) - cos(v, h) over all pairs of a caption and its hallucinated captions.
        hallucination_accuracy: share of these pairs with a positive margin.
    """

    image_to_text: torch.Tensor
    text_to_image: torch.Tensor
    retrieval_accuracy: torch.Tensor
    hallucination_margin: torch.Tensor
    hallucination_accuracy: torch.Tensor

    @property
    def loss(self) -> torch.Tensor:
        """(i2t + t2i) / 2, a scalar."""
        return (self.image_to_text + self.text_to_image) / 2


def contrastive_loss(
    image: torch.Tensor,
    caption: torch.Tensor,
    hallucinated: torch.Tensor,
    temperature: torch.Tensor,
    mode: NegativeMode,
    valid: torch.Tensor | None = None,
    hallucinated_valid: torch.Tensor | None = None,
    caption_group: torch.Tensor | None = None,
    hallucinated_group: torch.Tensor | None = None,
) -> ContrastiveResult:
    """The contrastive losses of one batch.

    Args:
        image, caption: (B, D), normalized.
        hallucinated: (B, K, D), normalized; K may be 0.
        temperature: scalar.
        mode: whose hallucinated captions an image is contrasted with.
        valid: (B,) bool; rows that are False count neither as rows nor as negatives.
        hallucinated_valid: (B, K) bool; False marks padding.
        caption_group: (B,) integers; captions of one group say the same, so none is a negative for the other's image.
        hallucinated_group: (B, K) integers on the same scale; a hallucinated caption that equals an image's true
            caption is no negative for that image.
    """
    batch_size, num_hallucinated = hallucinated.shape[:2]
    device = image.device
    if valid is None:
        valid = torch.ones(batch_size, dtype=torch.bool, device=device)
    if hallucinated_valid is None:
        hallucinated_valid = torch.ones(batch_size, num_hallucinated, dtype=torch.bool, device=device)
    if caption_group is None:
        caption_group = torch.arange(batch_size, device=device)
    own = torch.eye(batch_size, dtype=torch.bool, device=device)

    allowed_BB = valid[None, :] & (caption_group[:, None] != caption_group[None, :]) | own
    allowed_BBK = (hallucinated_valid & valid[:, None])[None].expand(batch_size, -1, -1)
    if mode == "paired":
        allowed_BBK = allowed_BBK & own[:, :, None]
    if hallucinated_group is not None:
        allowed_BBK = allowed_BBK & (caption_group[:, None, None] != hallucinated_group[None])

    image_text_BB = image @ caption.T
    image_hallucinated_BBK = torch.einsum("id,jkd->ijk", image, hallucinated)
    # Masking comes after the division: -inf / temperature would have no gradient.
    scores_BN = torch.cat(
        [
            _masked(image_text_BB / temperature, allowed_BB),
            _masked(image_hallucinated_BBK / temperature, allowed_BBK).flatten(1),
        ],
        dim=1,
    )
    targets = torch.arange(batch_size, device=device)
    weights = valid.to(image.dtype)
    count = weights.sum().clamp_min(1)

    def mean(values: torch.Tensor) -> torch.Tensor:
        return torch.where(valid, values, 0).sum() / count

    image_to_text = functional.cross_entropy(scores_BN, targets, reduction="none")
    text_to_image = functional.cross_entropy(
        _masked(image_text_BB.T / temperature, allowed_BB), targets, reduction="none"
    )
    with torch.no_grad():
        pairs = hallucinated_valid & valid[:, None]
        margins_BK = image_text_BB.diagonal()[:, None] - image_hallucinated_BBK[targets, targets]
        num_pairs = pairs.sum().clamp_min(1)
        accuracy = mean((scores_BN.argmax(dim=1) == targets).to(image.dtype))
        margin = torch.where(pairs, margins_BK, 0).sum() / num_pairs
        ranked = ((margins_BK > 0) & pairs).sum() / num_pairs
    return ContrastiveResult(mean(image_to_text), mean(text_to_image), accuracy, margin, ranked)


def _masked(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(~allowed, float("-inf"))
