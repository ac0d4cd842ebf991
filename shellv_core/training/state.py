"""All that training changes, as tensors with names: what a checkpoint holds.

Beside the engine's (see `engines.base`): HACL's queue, which all processes hold alike, and each one's random state.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import nn

from shellv_core.errors import TrainingError
from shellv_core.training.checkpoints import Checkpoint
from shellv_core.training.engines import Engine
from shellv_core.training.processes import num_processes, rank, tensor_from_all, tensors_from_first

QUEUE, RANDOM, RANDOM_CUDA = "queue.", "random_state.", "random_state_cuda."


def run_state(module: nn.Module, engine: Engine) -> dict[str, torch.Tensor]:
    """The state in the first process; in the others, which take part in the call, what they have of it."""
    state = engine.state()
    state |= {f"{RANDOM}{number}": each for number, each in enumerate(tensor_from_all(torch.get_rng_state()))}
    if torch.cuda.is_available():
        states = tensor_from_all(torch.cuda.get_rng_state())
        state |= {f"{RANDOM_CUDA}{number}": each for number, each in enumerate(states)}
    return state | {f"{QUEUE}{name}": buffer for name, buffer in _queue(module).items()}


def restore(checkpoint: Checkpoint | None, module: nn.Module, engine: Engine, seed: int, step: int) -> None:
    """Put the state of `run_state` back. Called by all processes, the first of which gives the checkpoint.

    On another number of processes than it was saved from, each draws its random numbers (dropout) anew.

    Raises:
        TrainingError: if it is that of another model.
    """
    tensors = checkpoint.tensors() if checkpoint else None
    # The engine's go through its own hands, as none of the others may be able to hold them all.
    others = None
    if tensors is not None:
        others = {name: tensors.pop(name) for name in list(tensors) if name.startswith((QUEUE, "random_state"))}
    others = dict(tensors_from_first(others))
    queue = _queue(module)
    held = {name.removeprefix(QUEUE): tensor.shape for name, tensor in others.items() if name.startswith(QUEUE)}
    if held != {name: buffer.shape for name, buffer in queue.items()}:
        raise TrainingError(f"the checkpoint of step {step} holds another queue than this run's; delete it.")
    engine.load(tensors)
    with torch.no_grad():
        for name, buffer in queue.items():
            buffer.copy_(others[f"{QUEUE}{name}"])
    if sum(name.startswith(RANDOM) for name in others) != num_processes():
        torch.manual_seed(int(np.random.SeedSequence([seed, step, rank()]).generate_state(1)[0]))
        return
    torch.set_rng_state(others[f"{RANDOM}{rank()}"])
    if torch.cuda.is_available() and f"{RANDOM_CUDA}{rank()}" in others:
        torch.cuda.set_rng_state(others[f"{RANDOM_CUDA}{rank()}"])


def _queue(module: nn.Module) -> dict[str, torch.Tensor]:
    queue = getattr(module, "queue", None)
    return dict(queue.named_buffers()) if isinstance(queue, nn.Module) else {}
