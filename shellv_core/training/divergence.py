"""Stops a run that no longer learns: losses that are not finite or explode."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

import torch

from shellv_core.errors import TrainingError
from shellv_core.training.checkpoints import Checkpoints
from shellv_core.training.config import TrainingConfig

WINDOW = 100
FIRST_STEPS = 20
#: In nats per token. Below it, a multiple of the median says little: what was learned by heart doubles easily.
LEAST_LOSS = 1.0


class DivergenceGuard:
    """Watches the generation loss, whose weight never changes.

    It explodes where it stays above `config.divergence_factor` times the median of the last 100 steps for
    `config.divergence_steps` steps. The median counts as 1 at least and, as in the first 20 steps, as the loss of
    guessing at most.

    Args:
        vocab_size: tokens to guess from.
        checkpoints: where the last good one is, for the message.
        recent: generation losses of the steps before this process, oldest first.
    """

    def __init__(
        self, config: TrainingConfig, vocab_size: int, checkpoints: Checkpoints, recent: Iterable[float] = ()
    ) -> None:
        self._config, self._guessing, self._checkpoints = config, max(math.log(vocab_size), LEAST_LOSS), checkpoints
        self.recent = list(recent)
        self._num_high = 0

    @property
    def suspicious(self) -> bool:
        """Whether the last loss was too high; no time for a checkpoint that may be the last good one."""
        return self._num_high > 0

    def check(self, step: int, metrics: Mapping[str, float]) -> None:
        """Look at ``loss``, ``gradient_norm`` and ``generation_loss`` of a step before its weights move.

        Raises:
            TrainingError: if one of them is not finite, or the loss explodes.
        """
        loss, norm = metrics["loss"], metrics["gradient_norm"]
        if not math.isfinite(loss) or not math.isfinite(norm):
            raise TrainingError(
                f"the loss is {loss} and the gradient norm {norm} at step {step}; lower the learning rates or"
                f" max_grad_norm, or use precision=fp32. As for what is saved, {self._checkpoints.describe_last()}."
            )
        factor, value = self._config.divergence_factor, metrics["generation_loss"]
        if factor is not None:
            usual = statistics.median(self.recent) if len(self.recent) >= FIRST_STEPS else self._guessing
            limit = factor * min(max(usual, LEAST_LOSS), self._guessing)
            self._num_high = self._num_high + 1 if value > limit else 0
            if self._num_high >= self._config.divergence_steps:
                raise TrainingError(
                    f"the generation loss explodes: it is {value:.3g} at step {step} and has been above {limit:.3g},"
                    f" {factor:g} times what it was, for {self._num_high} steps. Lower the learning rates and start"
                    " again, or go on with training.divergence_factor=null if this is meant. As for what is saved,"
                    f" {self._checkpoints.describe_last()}."
                )
        self.recent = [*self.recent[1 - WINDOW :], value]

    def check_state(self, step: int, state: Mapping[str, torch.Tensor]) -> None:
        """Look at what is about to be saved: a step may break weights that the next loss would have shown.

        Raises:
            TrainingError: if a weight is not finite.
        """
        for name, tensor in state.items():
            if name.startswith("weights.") and not bool(torch.isfinite(tensor).all()):
                raise TrainingError(
                    f"{name.removeprefix('weights.')} is not finite after step {step}; lower the learning rates."
                    f" As for what is saved, {self._checkpoints.describe_last()}."
                )
