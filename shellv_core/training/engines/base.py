"""What the loop asks of an engine, and what both have in common: the optimizer and the form of their state.

An engine's state is named by parameter: ``weights.NAME``, and ``optimizer.KEY.NAME`` for each of AdamW's (step,
exp_avg, exp_avg_sq), all whole and in float32. So what one engine saved on some number of processes, either engine
loads on any other number.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import nn

from shellv_core.errors import TrainingError
from shellv_core.training.batches import Batch
from shellv_core.training.config import TrainingConfig
from shellv_core.training.model import StepOutput, TrainingModel
from shellv_core.training.packed import PackedRow
from shellv_core.training.parts import PartName, learning_rates, part_of

WEIGHTS, OPTIMIZER = "weights.", "optimizer."
OPTIMIZER_KEYS = ("step", "exp_avg", "exp_avg_sq")


class Engine(Protocol):
    """Computes the steps of a run. Every method is called by all processes, in the same order.

    Attributes:
        details: what is in use, for the output's manifest.
    """

    details: dict[str, Any]

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """Around a forward and backward pass; gradients of a step's passes add up, and are exchanged in the last."""

    def forward(self, batch: Batch | PackedRow) -> StepOutput:
        """Run the module."""

    def backward(self, loss: torch.Tensor) -> None:
        """Add the gradients of `loss`; a step's are their mean over processes."""

    def gradient_norm(self) -> float:
        """The norm of the step's gradients, all parameters of all processes together; after the last `micro_step`."""

    def step(self, rate_factor: float) -> None:
        """Clip the gradients to ``max_grad_norm``, take an optimizer step and drop them.

        Args:
            rate_factor: of every learning rate.
        """

    def change(self, parameter: nn.Parameter, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Replace a parameter by a function of it, whatever copies there are."""

    def state(self) -> dict[str, torch.Tensor]:
        """The trained weights and the optimizer's state in the first process; nothing in the others."""

    def load(self, state: Mapping[str, torch.Tensor] | None) -> None:
        """Take over a `state`; processes other than the first give None.

        Raises:
            TrainingError: if it holds other weights than are trained.
        """

    def close(self) -> None:
        """Give the module back as it was, its trained weights whole in the first process at least."""


def trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that require gradients, by name."""
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def check_weights(names: set[str], module: nn.Module) -> None:
    """Refuse a state with other weights than `module` trains.

    Args:
        names: of the state's tensors.

    Raises:
        TrainingError: if they are not the same.
    """
    if {name.removeprefix(WEIGHTS) for name in names if name.startswith(WEIGHTS)} != set(trainable(module)):
        raise TrainingError("the checkpoint holds other weights than this model trains; delete it.")


def build_optimizer(module: TrainingModel, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with one learning rate per part; vectors (norms, biases) and the temperature do not decay.

    Raises:
        TrainingError: if nothing is trainable.
    """
    rates = learning_rates(module, config)
    groups: dict[tuple[PartName, bool], list[nn.Parameter]] = {}
    for name, parameter in trainable(module).items():
        groups.setdefault((part_of(name), parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise TrainingError(f"nothing is trainable with training.trainable={config.trainable!r}.")
    return torch.optim.AdamW(
        [
            {"params": parameters, "base_lr": rates[part], "weight_decay": config.weight_decay if decays else 0.0}
            for (part, decays), parameters in groups.items()
        ],
        betas=(0.9, config.adam_beta2),
        fused=True,
    )


def set_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Give every group its learning rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def precision(autocast: bool, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The context of a forward pass: bfloat16 autocast, or none."""
    return torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()
