"""HACL's contrastive objective as pure functions of embeddings.

N images with one caption each, K hallucinated captions (lies) per image, D dimensions. v, t, h are the normalized
embeddings of images, captions and lies, T is the temperature. For image i and its caption::

    i2t = -log exp(v_i.t_i / T) / (sum_j exp(v_i.t_j / T) + sum_h exp(v_i.h / T) + sum_q exp(v_i.q / T))
    t2i = -log exp(t_i.v_i / T) / (sum_j exp(t_i.v_j / T) + sum_w exp(t_i.w / T))

The sum over h is over the image's own lies ("paired", as printed in the paper) or over those of the whole batch
("batch", as in the released code); q are the texts and w the images of earlier steps (`losses.queue`), in either mode.
Lies have no image, so t2i does not see them. A text that says what is true of image i is no negative of it: one that
equals its caption or one of its truths.

A lie may have a truth u of its own: the true sentence in the lie's style, which is not the caption. Against the
caption, style alone would tell such a lie, so it leaves the sum over h and the image must tell it from its truth::

    truth = -log exp(v_i.u_ik / T) / (exp(v_i.u_ik / T) + exp(v_i.h_ik / T))

With r_ik the truth of lie k where it has one and the caption otherwise, and m a margin, texts alone may be kept apart::

    text_margin = max(0, m - (1 - r_ik.h_ik))

i2t and t2i are means over images, the other two over pairs of a lie and r.

Source: Hallucination Augmented Contrastive Learning, arXiv:2312.06968; X-PLUG/mPLUG-HalOwl@63863fc hacl/. The truth and
margin terms are ours.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional

from shellv_core.training.examples import TYPES

NegativeMode = Literal["paired", "batch"]


@dataclass(frozen=True)
class ContrastFeatures:
    """What is compared: N images, their captions, and K slots for lies each.

    Attributes:
        image, caption: (N, D), normalized.
        hallucinated: (N, K, D), normalized; K may be 0.
        valid: (N,) bool; rows that are False count neither as rows nor as negatives.
        hallucinated_valid: (N, K) bool; False marks padding.
        caption_group: (N,) integers, equal for texts that say the same; so on one scale with
        hallucinated_group, truth_group: (N, K).
        hallucinated_type: (N, K) index in `TYPES`.
        truth_valid: (N, K) bool; whether a lie has a truth of its own.
        truth: (N, K, D), normalized where valid; None if no lie has one.
    """

    image: torch.Tensor
    caption: torch.Tensor
    hallucinated: torch.Tensor
    valid: torch.Tensor
    hallucinated_valid: torch.Tensor
    caption_group: torch.Tensor
    hallucinated_group: torch.Tensor
    hallucinated_type: torch.Tensor
    truth_valid: torch.Tensor
    truth_group: torch.Tensor
    truth: torch.Tensor | None = None

    @classmethod
    def of(
        cls,
        image: torch.Tensor,
        caption: torch.Tensor,
        hallucinated: torch.Tensor,
        valid: torch.Tensor | None = None,
        hallucinated_valid: torch.Tensor | None = None,
        caption_group: torch.Tensor | None = None,
        hallucinated_group: torch.Tensor | None = None,
        hallucinated_type: torch.Tensor | None = None,
        truth: torch.Tensor | None = None,
        truth_valid: torch.Tensor | None = None,
        truth_group: torch.Tensor | None = None,
    ) -> ContrastFeatures:
        """Fill in what is left out: all rows count, no two texts say the same, nothing is known of the lies' types."""
        rows, slots = hallucinated.shape[:2]
        device = image.device
        numbers = torch.arange(rows * slots, device=device).view(rows, slots)
        everywhere = torch.ones(rows, slots, dtype=torch.bool, device=device)
        if truth_valid is None:
            truth_valid = everywhere & (truth is not None)
        return cls(
            image=image,
            caption=caption,
            hallucinated=hallucinated,
            valid=torch.ones(rows, dtype=torch.bool, device=device) if valid is None else valid,
            hallucinated_valid=everywhere if hallucinated_valid is None else hallucinated_valid,
            caption_group=torch.arange(rows, device=device) if caption_group is None else caption_group,
            hallucinated_group=-1 - numbers if hallucinated_group is None else hallucinated_group,
            hallucinated_type=torch.full_like(numbers, len(TYPES) - 1)
            if hallucinated_type is None
            else hallucinated_type,
            truth_valid=truth_valid,
            truth_group=-1 - numbers.numel() - numbers if truth_group is None else truth_group,
            truth=truth,
        )

    def detached(self) -> ContrastFeatures:
        """The same values without their graph."""
        return replace(self, **{name: each.detach() for name, each in vars(self).items() if each is not None})


@dataclass(frozen=True)
class QueuedNegatives:
    """Detached features of earlier steps: Q slots for texts and for images, `valid` where one is filled.

    Attributes:
        text, image: (Q, D).
        text_valid, image_valid: (Q,) bool.
        text_group, image_group: (Q,); an image has its caption's.
    """

    text: torch.Tensor
    text_valid: torch.Tensor
    text_group: torch.Tensor
    image: torch.Tensor
    image_valid: torch.Tensor
    image_group: torch.Tensor


@dataclass(frozen=True)
class ContrastResult:
    """Mean losses over what is valid (scalars; zero without any), and the same figures' detached metrics.

    Attributes:
        image_to_text, text_to_image, text_margin: see the module.
        truth: None if no lie has a truth of its own.
        retrieval_accuracy: share of images whose own caption scores highest among all texts in their contrast.
        hallucination_margin: mean of cos(v, r) - cos(v, h) over all pairs of a lie and the truth or caption r that it
            is to be told from.
        hallucination_accuracy: share of these pairs with a positive margin.
        margin_sums, margin_counts: (len(TYPES),) the margins' sum and number by the lie's type.
    """

    image_to_text: torch.Tensor
    text_to_image: torch.Tensor
    truth: torch.Tensor | None
    text_margin: torch.Tensor
    retrieval_accuracy: torch.Tensor
    hallucination_margin: torch.Tensor
    hallucination_accuracy: torch.Tensor
    margin_sums: torch.Tensor
    margin_counts: torch.Tensor

    def objective(self, truth_weight: float = 0.0, text_margin_weight: float = 0.0) -> torch.Tensor:
        """(i2t + t2i) / 2 and the weighted truth and margin terms, a scalar."""
        total = (self.image_to_text + self.text_to_image) / 2
        if self.truth is not None and truth_weight:
            total = total + truth_weight * self.truth
        return total + text_margin_weight * self.text_margin if text_margin_weight else total


def contrastive_loss(
    features: ContrastFeatures,
    temperature: torch.Tensor,
    mode: NegativeMode,
    queue: QueuedNegatives | None = None,
    text_margin: float = 0.0,
    rows: tuple[int, int] | None = None,
    num_ranks: int = 1,
) -> ContrastResult:
    """The contrastive losses of a batch, or this process's part of those of a batch that several processes share.

    Args:
        features: of all processes, joined in the order of their ranks.
        temperature: scalar.
        mode: whose lies an image is contrasted with.
        queue: further negatives.
        text_margin: m, in cosine distance (0..2).
        rows: first and last (exclusive) of this process's rows; all without it.
        num_ranks: processes that share the batch. Each returns its rows' sum, divided by all that counts, times this:
            the mean of the results over processes is the whole batch's, and so is the mean of their gradients.
    """
    num_rows = len(features.image)
    start, stop = rows or (0, num_rows)
    device = features.image.device
    targets = torch.arange(start, stop, device=device)
    images_RD = features.image[start:stop]
    own_NN = torch.eye(num_rows, dtype=torch.bool, device=device)
    told_NK = features.hallucinated_valid & features.valid[:, None]
    true_NN = _true_of(features, features.caption_group)
    text_allowed_RN = (~true_NN & features.valid | own_NN)[start:stop]
    image_allowed_RN = (~true_NN.T & features.valid | own_NN)[start:stop]
    lie_allowed_RNK = ~_true_of(features, features.hallucinated_group)[start:stop] & told_NK & ~features.truth_valid
    if mode == "paired":
        lie_allowed_RNK = lie_allowed_RNK & own_NN[start:stop, :, None]

    cosines_NN = features.image @ features.caption.T
    lie_cosines_RNK = torch.einsum("id,jkd->ijk", images_RD, features.hallucinated)
    # Masking comes after the division: -inf / temperature would have no gradient.
    text_scores = [
        _masked(cosines_NN[start:stop] / temperature, text_allowed_RN),
        _masked(lie_cosines_RNK / temperature, lie_allowed_RNK).flatten(1),
    ]
    image_scores = [_masked(cosines_NN[:, start:stop].T / temperature, image_allowed_RN)]
    if queue is not None:
        text_allowed_RQ = ~_true_of(features, queue.text_group)[start:stop] & queue.text_valid
        text_scores.append(_masked(images_RD @ queue.text.T / temperature, text_allowed_RQ))
        image_allowed_RQ = (features.caption_group[start:stop, None] != queue.image_group) & queue.image_valid
        captions_RD = features.caption[start:stop]
        image_scores.append(_masked(captions_RD @ queue.image.T / temperature, image_allowed_RQ))
    scores_RM, image_scores_RM = torch.cat(text_scores, dim=1), torch.cat(image_scores, dim=1)

    # A lie that says what its truth says is none.
    true_group_NK = torch.where(features.truth_valid, features.truth_group, features.caption_group[:, None])
    pairs_NK = told_NK & (features.hallucinated_group != true_group_NK)
    own_lies_RK = lie_cosines_RNK[targets - start, targets]
    true_RK = cosines_NN.diagonal()[start:stop, None].expand_as(own_lies_RK)
    true_texts_RKD = features.caption[start:stop, None]
    truth_loss = None
    if features.truth is not None:
        truths_RKD, has_truth_NK = features.truth[start:stop], features.truth_valid
        truth_cosines_RK = torch.einsum("id,ikd->ik", images_RD, truths_RKD)
        values = functional.softplus((own_lies_RK - truth_cosines_RK) / temperature)
        truth_loss = _mean(values, pairs_NK & has_truth_NK, start, stop, num_ranks)
        true_RK = torch.where(has_truth_NK[start:stop], truth_cosines_RK, true_RK)
        true_texts_RKD = torch.where(has_truth_NK[start:stop, :, None], truths_RKD, true_texts_RKD)
    text_cosines_RK = (true_texts_RKD * features.hallucinated[start:stop]).sum(-1)
    hinge_RK = (text_margin - (1 - text_cosines_RK)).clamp_min(0)

    image_to_text = functional.cross_entropy(scores_RM, targets, reduction="none")
    text_to_image = functional.cross_entropy(image_scores_RM, targets, reduction="none")
    dtype = images_RD.dtype
    with torch.no_grad():
        margins_RK = true_RK - own_lies_RK
        hits_R = (scores_RM.argmax(dim=1) == targets).to(dtype)
        types = torch.arange(len(TYPES), device=device)
        of_type_NKY = pairs_NK[:, :, None] & (features.hallucinated_type[:, :, None] == types)
        sums_Y = torch.where(of_type_NKY[start:stop], margins_RK[:, :, None], 0).sum((0, 1)) * num_ranks
    return ContrastResult(
        image_to_text=_mean(image_to_text, features.valid, start, stop, num_ranks),
        text_to_image=_mean(text_to_image, features.valid, start, stop, num_ranks),
        truth=truth_loss,
        text_margin=_mean(hinge_RK, pairs_NK, start, stop, num_ranks),
        retrieval_accuracy=_mean(hits_R, features.valid, start, stop, num_ranks),
        hallucination_margin=_mean(margins_RK, pairs_NK, start, stop, num_ranks),
        hallucination_accuracy=_mean((margins_RK > 0).to(dtype), pairs_NK, start, stop, num_ranks),
        margin_sums=sums_Y,
        margin_counts=of_type_NKY.sum((0, 1)),
    )


def _mean(values: torch.Tensor, counted: torch.Tensor, start: int, stop: int, num_ranks: int) -> torch.Tensor:
    """The sum of rows start..stop, which `values` holds, by the number of all that is `counted`."""
    total = torch.where(counted[start:stop], values, 0).sum() / counted.sum().clamp_min(1)
    return total * num_ranks if num_ranks > 1 else total


def _true_of(features: ContrastFeatures, groups: torch.Tensor) -> torch.Tensor:
    """(N, *groups.shape): whether texts of these `groups` say what is true of image i by its caption or a truth."""
    flat = groups.flatten()
    same = features.caption_group[:, None] == flat
    if features.truth is not None:
        told = (features.truth_group[:, :, None] == flat) & features.truth_valid[:, :, None]
        same = same | told.any(dim=1)
    return same.view(len(same), *groups.shape)


def _masked(scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor:
    return scores.masked_fill(~allowed, float("-inf"))
