"""Every process holds the whole model and optimizer; gradients are averaged. In one process, plain training."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from shellv_core.training.batches import Batch
from shellv_core.training.config import TrainingConfig
from shellv_core.training.engines.base import (
    OPTIMIZER,
    WEIGHTS,
    build_optimizer,
    check_weights,
    precision,
    set_rates,
    trainable,
)
from shellv_core.training.model import StepOutput, TrainingModel
from shellv_core.training.packed import PackedRow
from shellv_core.training.processes import num_processes, rank, tensors_from_first


class DDPEngine:
    """See `Engine`."""

    def __init__(self, module: TrainingModel, config: TrainingConfig) -> None:
        self.module, self.config = module, config
        self.details: dict[str, Any] = {"engine": "ddp", "num_processes": num_processes()}
        self.optimizer = build_optimizer(module, config)
        self._parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        self._wrapped: nn.Module = module
        if num_processes() > 1:
            device = module.model.device
            # The queue is filled with the same in all processes; nothing is to be copied from the first.
            self._wrapped = DistributedDataParallel(
                module, device_ids=[device] if device.type == "cuda" else None, forward_sync_buffers=False
            )

    def micro_step(self, last: bool) -> contextlib.AbstractContextManager[None]:
        """See `Engine`."""
        if isinstance(self._wrapped, DistributedDataParallel) and not last:
            context: contextlib.AbstractContextManager[None] = self._wrapped.no_sync()
            return context
        return contextlib.nullcontext()

    def forward(self, batch: Batch | PackedRow) -> StepOutput:
        """See `Engine`."""
        with precision(self.config.precision == "bf16", self.module.model.device):
            output: StepOutput = self._wrapped(batch)
        return output

    def backward(self, loss: torch.Tensor) -> None:
        """See `Engine`."""
        loss.backward()

    def gradient_norm(self) -> float:
        """See `Engine`; it clips at once.

        A parameter that nothing in the step used has a gradient of 0, as in sharded engines, and not none.
        """
        for parameter in self._parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
        return float(nn.utils.clip_grad_norm_(self._parameters, self.config.max_grad_norm))

    def step(self, rate_factor: float) -> None:
        """See `Engine`."""
        set_rates(self.optimizer, rate_factor)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def change(self, parameter: nn.Parameter, function: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """See `Engine`."""
        with torch.no_grad():
            parameter.copy_(function(parameter))

    def state(self) -> dict[str, torch.Tensor]:
        """See `Engine`."""
        if rank():
            return {}
        tensors = {}
        for name, parameter in trainable(self.module).items():
            tensors[f"{WEIGHTS}{name}"] = parameter.detach()
            for key, value in self.optimizer.state[parameter].items():
                tensors[f"{OPTIMIZER}{key}.{name}"] = value.detach()
        return tensors

    def load(self, state: Mapping[str, torch.Tensor] | None) -> None:
        """See `Engine`."""
        tensors = dict(tensors_from_first(state))
        check_weights(set(tensors), self.module)
        for name, parameter in trainable(self.module).items():
            with torch.no_grad():
                parameter.copy_(tensors.pop(f"{WEIGHTS}{name}"))
        parameters = trainable(self.module)
        for full_name, tensor in tensors.items():
            key, _, name = full_name.removeprefix(OPTIMIZER).partition(".")
            # Of a tensor that a file maps, no view may stay.
            self.optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device)

    def close(self) -> None:
        """See `Engine`."""
