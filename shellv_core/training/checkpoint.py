"""Checkpoints of a training run: one safetensors file, replaced in one step, without pickles."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from shellv_core.errors import TrainingError

FILE_NAME = "checkpoint.safetensors"


def save_checkpoint(
    directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, step: int, identity: str
) -> None:
    """Write what is needed to go on after `step` optimizer steps; an earlier checkpoint is replaced atomically."""
    tensors = {"random_state": torch.get_rng_state()}
    if torch.cuda.is_available():
        tensors["random_state_cuda"] = torch.cuda.get_rng_state()
    for name, parameter in _trainable(module).items():
        tensors[f"weights.{name}"] = parameter.detach().contiguous()
        for key, value in optimizer.state[parameter].items():
            tensors[f"optimizer.{key}.{name}"] = value.detach().contiguous()
    for name, buffer in _queue(module).items():
        tensors[f"queue.{name}"] = buffer.contiguous()
    path = directory / FILE_NAME
    unfinished = path.with_suffix(".tmp")
    save_file(tensors, unfinished, metadata={"state": json.dumps({"step": step, "identity": identity})})
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def load_checkpoint(directory: Path, module: nn.Module, optimizer: torch.optim.Optimizer, identity: str) -> int:
    """Restore the state of `save_checkpoint` and return its step; 0 if there is no checkpoint.

    Raises:
        TrainingError: if the checkpoint is damaged or belongs to another run.
    """
    path = directory / FILE_NAME
    if not path.exists():
        return 0
    try:
        with safe_open(path, framework="pt") as file:
            state = json.loads((file.metadata() or {})["state"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise TrainingError(f"the checkpoint {path} is damaged ({error}); delete it and start again.") from error
    if state["identity"] != identity:
        raise TrainingError(
            f"the checkpoint {path} belongs to a run with other data or settings; delete it and start again."
        )
    parameters = _trainable(module)
    if {name.removeprefix("weights.") for name in tensors if name.startswith("weights.")} != set(parameters):
        raise TrainingError(f"the checkpoint {path} holds other weights than this model trains; delete it.")
    queue = _queue(module)
    held = {name.removeprefix("queue."): tensor.shape for name, tensor in tensors.items() if name.startswith("queue.")}
    if held != {name: buffer.shape for name, buffer in queue.items()}:
        raise TrainingError(f"the checkpoint {path} holds another queue than this run's; delete it.")
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(tensors[f"weights.{name}"])
        for name, buffer in queue.items():
            buffer.copy_(tensors[f"queue.{name}"])
    for full_name, tensor in tensors.items():
        kind, _, rest = full_name.partition(".")
        if kind == "optimizer":
            key, _, name = rest.partition(".")
            optimizer.state[parameters[name]][key] = tensor.to(parameters[name].device)
    torch.set_rng_state(tensors["random_state"])
    if "random_state_cuda" in tensors and torch.cuda.is_available():
        torch.cuda.set_rng_state(tensors["random_state_cuda"])
    return int(state["step"])


def _trainable(module: nn.Module) -> dict[str, nn.Parameter]:
    return {name: parameter for name, parameter in module.named_parameters() if parameter.requires_grad}


def _queue(module: nn.Module) -> dict[str, torch.Tensor]:
    queue = getattr(module, "queue", None)
    return dict(queue.named_buffers()) if isinstance(queue, nn.Module) else {}
