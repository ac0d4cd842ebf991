"""Checkpoints of a training run: one safetensors file, replaced in one step, without pickles."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from shellv_core.errors import TrainingError
from shellv_core.training.engines import Engine
from shellv_core.training.processes import from_first, num_processes, rank, tensor_from_all, tensors_from_first

FILE_NAME = "checkpoint.safetensors"


def save_checkpoint(
    directory: Path,
    module: nn.Module,
    engine: Engine,
    step: int,
    identity: str,
    position: Mapping[str, Any] | None = None,
) -> None:
    """Write what is needed to go on after `step` optimizer steps; an earlier checkpoint is replaced atomically.

    Called by all processes; the first one writes.

    Args:
        position: where in its data the run stands, in JSON's types, if `step` does not say it.
    """
    tensors = engine.state()
    for number, random_state in enumerate(tensor_from_all(torch.get_rng_state())):
        tensors[f"random_state.{number}"] = random_state
    if torch.cuda.is_available():
        for number, random_state in enumerate(tensor_from_all(torch.cuda.get_rng_state())):
            tensors[f"random_state_cuda.{number}"] = random_state
    if rank():
        return
    tensors |= {f"queue.{name}": buffer for name, buffer in _queue(module).items()}
    path = directory / FILE_NAME
    unfinished = path.with_suffix(".tmp")
    state = {"step": step, "identity": identity, "position": position}
    contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(contiguous, unfinished, metadata={"state": json.dumps(state)})
    with unfinished.open("rb") as file:
        os.fsync(file.fileno())
    unfinished.replace(path)


def load_checkpoint(
    directory: Path, module: nn.Module, engine: Engine, identity: str, seed: int = 0
) -> tuple[int, dict[str, Any] | None]:
    """Restore the state of `save_checkpoint` and return its step and position; 0 and None if there is no checkpoint.

    Called by all processes; the first one reads. On another number of processes than it was saved from, each draws its
    random numbers (dropout) anew.

    Raises:
        TrainingError: if the checkpoint is damaged or belongs to another run.
    """
    state, tensors = _read(directory / FILE_NAME, identity) if rank() == 0 else (None, None)
    state = from_first(state)
    if state is None:
        return 0, None
    others = ("queue.", "random_state")
    rest = None
    if tensors is not None:
        rest = {name: tensor for name, tensor in tensors.items() if name.startswith(others)}
        tensors = {name: tensor for name, tensor in tensors.items() if name not in rest}
    rest = dict(tensors_from_first(rest))
    queue = _queue(module)
    held = {name.removeprefix("queue."): tensor.shape for name, tensor in rest.items() if name.startswith("queue.")}
    if held != {name: buffer.shape for name, buffer in queue.items()}:
        raise TrainingError(f"the checkpoint in {directory} holds another queue than this run's; delete it.")
    engine.load(tensors)
    with torch.no_grad():
        for name, buffer in queue.items():
            buffer.copy_(rest[f"queue.{name}"])
    if sum(name.startswith("random_state.") for name in rest) == num_processes():
        torch.set_rng_state(rest[f"random_state.{rank()}"])
        if torch.cuda.is_available() and f"random_state_cuda.{rank()}" in rest:
            torch.cuda.set_rng_state(rest[f"random_state_cuda.{rank()}"])
    else:
        torch.manual_seed(int(np.random.SeedSequence([seed, state["step"], rank()]).generate_state(1)[0]))
    return int(state["step"]), state["position"]


def _read(path: Path, identity: str) -> tuple[dict[str, Any] | None, dict[str, torch.Tensor] | None]:
    if not path.exists():
        return None, None
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
    return state, tensors


def _queue(module: nn.Module) -> dict[str, torch.Tensor]:
    queue = getattr(module, "queue", None)
    return dict(queue.named_buffers()) if isinstance(queue, nn.Module) else {}
