"""The next token of each prompt: the most likely one, or a sample by the prompt's own random numbers."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from shellv_core.evaluation.answers import Prompt


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen: `temperature` 0 is greedy; `top_p` in (0, 1] keeps the most likely tokens."""

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0


class TokenChooser:
    """Chooses for a batch of prompts, step by step.

    A prompt's random numbers come from its own seed, one for each step, so that neither its place nor its company in a
    batch changes what is sampled.
    """

    def __init__(self, sampling: Sampling, prompts: Sequence[Prompt]) -> None:
        self._sampling = sampling
        greedy = not sampling.temperature
        self._chances = [] if greedy else [random.Random(prompt.seed(sampling.seed)) for prompt in prompts]

    def __call__(self, logits: torch.Tensor) -> torch.Tensor:
        """Token ids [prompts] from finite scores [prompts, vocabulary]."""
        if not self._chances:
            return logits.argmax(dim=-1)
        scores = logits.float()
        # The largest score is taken off first, so that a tiny temperature does not overflow.
        shares = ((scores - scores.amax(dim=-1, keepdim=True)) / self._sampling.temperature).softmax(dim=-1)
        shares, order = shares.sort(dim=-1, descending=True, stable=True)
        shares = shares.masked_fill(shares.cumsum(dim=-1) - shares >= self._sampling.top_p, 0.0)
        bounds = shares.double().cumsum(dim=-1)
        drawn = torch.tensor([[chance.random()] for chance in self._chances], dtype=torch.float64, device=logits.device)
        places = torch.searchsorted(bounds, drawn * bounds[:, -1:], right=True)
        # A product that rounds up to the whole sum would fall behind the last token that is kept.
        last = (shares > 0).sum(dim=-1, keepdim=True) - 1
        return order.gather(-1, torch.minimum(places, last)).squeeze(-1)
