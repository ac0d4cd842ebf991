"""A preference of true over false captions, as pure functions of summed log-probabilities.

x is an image with a prompt, w the caption that is preferred (the lie's own truth where it has one), l the lie, x'
another image with the same prompt. With the implicit reward r(y|x) = beta * (log p(y|x) - log p_reference(y|x))::

    answer = -log sigmoid(r(w|x) - r(l|x))       DPO
    image  = -log sigmoid(r(w|x) - r(w|x'))      the image must matter: the same caption is worth less for another
    anchor = -log sigmoid(r(w|x) - anchor)       the preferred caption must not become less likely itself

Source: DPO, arXiv:2305.18290 eq. 7; mDPO, arXiv:2406.11839 (its image term crops the image where ours takes another).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch.nn import functional


@dataclass(frozen=True)
class AnswerLogProbabilities:
    """Log-probabilities in nats, summed over an answer's tokens: each (P,).

    Attributes:
        chosen, rejected: of caption and lie, given their image.
        elsewhere: of the caption given another image; anything where there is none.
    """

    chosen: torch.Tensor
    rejected: torch.Tensor
    elsewhere: torch.Tensor


@dataclass(frozen=True)
class PreferenceResult:
    """Mean losses (scalars; zero without a pair), and detached metrics.

    Attributes:
        answer, image, anchor: see the module.
        reward_margin: mean of r(w|x) - r(l|x).
        image_reward_margin: mean of r(w|x) - r(w|x'), where there is an x'.
        accuracy: share of pairs with r(w|x) > r(l|x).
    """

    answer: torch.Tensor
    image: torch.Tensor
    anchor: torch.Tensor
    reward_margin: torch.Tensor
    image_reward_margin: torch.Tensor
    accuracy: torch.Tensor

    def objective(self, image_weight: float, anchor_weight: float) -> torch.Tensor:
        """answer + image_weight * image + anchor_weight * anchor, a scalar."""
        return self.answer + image_weight * self.image + anchor_weight * self.anchor


def preference_loss(
    policy: AnswerLogProbabilities,
    reference: AnswerLogProbabilities,
    has_elsewhere: torch.Tensor,
    beta: float,
    anchor: float,
) -> PreferenceResult:
    """The preference losses of P pairs.

    Args:
        policy: of the model that learns.
        reference: of the model that it started from; it gets no gradient.
        has_elsewhere: (P,) bool, whether another image was at hand.
        beta: strength of the tie to the reference.
        anchor: reward that the preferred caption shall exceed.
    """
    chosen = beta * (policy.chosen - reference.chosen.detach())
    rejected = beta * (policy.rejected - reference.rejected.detach())
    elsewhere = beta * (policy.elsewhere - reference.elsewhere.detach())
    everywhere = torch.ones_like(has_elsewhere)
    margin, image_margin = chosen - rejected, chosen - elsewhere
    with torch.no_grad():
        reward_margin = _mean(margin, everywhere)
        image_reward_margin = _mean(image_margin, has_elsewhere)
        accuracy = _mean((margin > 0).to(margin.dtype), everywhere)
    return PreferenceResult(
        answer=_mean(-functional.logsigmoid(margin), everywhere),
        image=_mean(-functional.logsigmoid(image_margin), has_elsewhere),
        anchor=_mean(-functional.logsigmoid(chosen - anchor), everywhere),
        reward_margin=reward_margin,
        image_reward_margin=image_reward_margin,
        accuracy=accuracy,
    )


def _mean(values: torch.Tensor, counted: torch.Tensor) -> torch.Tensor:
    return torch.where(counted, values, 0).sum() / counted.sum().clamp_min(1)
