"""The next token of one sequence from its logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch


def sample(logits_V: torch.Tensor, temperature: float, top_p: float, generator: torch.Generator | None) -> int:
    """Pick a token id.

    Args:
        logits_V: finite scores over the vocabulary, shape [V].
        temperature: 0 picks the most likely token.
        top_p: in (0, 1]; the smallest set of most likely tokens that holds at least this share is sampled from.
        generator: the request's own source of randomness, on the CPU.
    """
    import torch

    if temperature == 0:
        return int(logits_V.argmax())
    scores_V = logits_V.float().cpu()
    # The largest score is taken off first, so that a tiny temperature does not overflow.
    probabilities_V = ((scores_V - scores_V.max()) / temperature).softmax(dim=-1)
    if top_p < 1:
        sorted_V, order_V = probabilities_V.sort(descending=True, stable=True)
        sorted_V[sorted_V.cumsum(dim=-1) - sorted_V >= top_p] = 0
        return int(order_V[torch.multinomial(sorted_V, 1, generator=generator)])
    return int(torch.multinomial(probabilities_V, 1, generator=generator))
