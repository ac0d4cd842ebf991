"""The processes of one run, as torchrun starts them: who each is, and what they tell one another.

Everything here works in a single process too, where there is no one to tell. Importing it needs no torch.
"""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from shellv_core.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    import torch

#: A collective call in which some process does not take part fails after this time.
COLLECTIVE_TIMEOUT = timedelta(minutes=30)
#: Waiting for one process's work (features of all images, the output's upload) ends after this time.
WAIT_TIMEOUT = timedelta(hours=24)
#: A process other than the first, whose message may only repeat the first one's, leaves it this long to speak; one that
#: fails because another did leaves that one, and the launcher, this long.
GRACE_SECONDS, PEER_GRACE_SECONDS = 5.0, 30.0
#: How torch words that another process has gone.
_PEER_FAULTS = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting", "NCCL")

_waiting_group: Any = None
_alone = False


@dataclass(frozen=True)
class Launch:
    """This process's place among those that were started together."""

    rank: int = 0
    size: int = 1
    local_rank: int = 0

    @property
    def first(self) -> bool:
        """Whether this process tracks, writes the output and prints the result."""
        return self.rank == 0


def launched() -> Launch:
    """What torchrun says of this process; alone without it.

    Raises:
        ConfigError: if its variables do not fit together.
    """
    if _alone:
        return Launch()
    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    values = [os.environ.get(name, "") for name in names]
    if not values[1]:
        return Launch()
    if not all(value.isdecimal() for value in values) or int(values[0]) >= int(values[1]):
        given = ", ".join(f"{name}={value!r}" for name, value in zip(names, values, strict=True))
        raise ConfigError(
            f"the launcher's variables do not fit together: {given}; start with torchrun, which sets"
            " them, or unset them for a single process."
        )
    return Launch(*map(int, values))


def leave_first_to_speak() -> None:
    """Wait a moment in processes other than the first: what fails in all is then reported once.

    The launcher ends a run's other processes when one has failed.
    """
    if os.environ.get("RANK", "0") != "0":
        time.sleep(GRACE_SECONDS)


@contextlib.contextmanager
def joined() -> Iterator[Launch]:
    """Within it, the processes of a launch can talk: through gloo, and on CUDA (one device a process) through NCCL.

    Raises:
        TrainingError: if another process fails or stops answering.
    """
    launch = launched()
    if launch.size == 1:
        yield launch
        return
    import torch
    from torch import distributed

    global _waiting_group
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(launch.local_rank)
        backend = "cpu:gloo,cuda:nccl"
    try:
        distributed.init_process_group(backend, timeout=COLLECTIVE_TIMEOUT)
        _waiting_group = distributed.new_group(backend="gloo", timeout=WAIT_TIMEOUT)
        yield launch
    except RuntimeError as error:
        if not any(fault in str(error) for fault in _PEER_FAULTS):
            raise
        # The launcher ends this process in the meantime; the one that failed has said why.
        time.sleep(PEER_GRACE_SECONDS)
        raise TrainingError(
            f"another process of this run has failed or stopped answering: {str(error).splitlines()[0]}"
        ) from error
    finally:
        _waiting_group = None
        if distributed.is_initialized():
            distributed.destroy_process_group()


def rank() -> int:
    """This process's number; 0 outside of torch.distributed."""
    return _distributed().get_rank() if num_processes() > 1 else 0


def num_processes() -> int:
    """Processes that train together; 1 outside of torch.distributed."""
    if _alone or sys.modules.get("torch") is None:
        # No process that has not loaded torch has joined others: stages that need no torch run without it.
        return 1
    distributed = _distributed()
    return int(distributed.get_world_size()) if distributed.is_available() and distributed.is_initialized() else 1


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """Within it, this process is by itself: what it computes is no part of what all compute together."""
    global _alone
    before, _alone = _alone, True
    try:
        yield
    finally:
        _alone = before


@contextlib.contextmanager
def first_on_node() -> Iterator[None]:
    """The block runs in one process of every machine, then in its others, which find what the first has left."""
    if num_processes() == 1:
        yield
        return
    first = launched().local_rank == 0 if os.environ.get("WORLD_SIZE") else rank() == 0
    if not first:
        _wait()
    yield
    if first:
        _wait()


def from_first(value: Any) -> Any:
    """The first process's `value`, in JSON's types, in all."""
    if num_processes() == 1:
        return value
    values = [value if rank() == 0 else None]
    _distributed().broadcast_object_list(values, src=0, group=_waiting_group)
    return values[0]


def tensors_from_first(tensors: Mapping[str, torch.Tensor] | None) -> Iterator[tuple[str, torch.Tensor]]:
    """The first process's tensors, on CPU, in all, one after another."""
    if num_processes() == 1:
        yield from (tensors or {}).items()
        return
    import torch

    described = [
        (name, str(tensor.dtype).removeprefix("torch."), list(tensor.shape)) for name, tensor in (tensors or {}).items()
    ]
    for name, dtype, shape in from_first(described):
        tensor = (
            torch.empty(shape, dtype=getattr(torch, dtype)) if tensors is None else tensors[name].cpu().contiguous()
        )
        _distributed().broadcast(tensor, src=0)
        yield name, tensor


def tensor_from_all(tensor: torch.Tensor) -> list[torch.Tensor]:
    """Every process's tensor on CPU, all of one shape and type, by rank."""
    if num_processes() == 1:
        return [tensor]
    import torch

    found = [torch.empty_like(tensor) for _ in range(num_processes())]
    _distributed().all_gather(found, tensor.contiguous())
    return found


def sums(values: Sequence[float]) -> list[float]:
    """Sums over processes; all give as many values."""
    if num_processes() == 1:
        return list(values)
    import torch

    total = torch.tensor(values, dtype=torch.float64)
    _distributed().all_reduce(total)
    result: list[float] = total.tolist()
    return result


def means(metrics: Mapping[str, float], names: Sequence[str]) -> dict[str, float]:
    """Means over processes of those of `names` that any process has; where one lacks it, it counts as 0."""
    if num_processes() == 1:
        return dict(metrics)
    has = [float(name in metrics) for name in names]
    values = sums([*(metrics.get(name, 0.0) for name in names), *has])
    count = num_processes()
    return {name: values[at] / count for at, name in enumerate(names) if values[len(names) + at]}


def _wait() -> None:
    _distributed().barrier(group=_waiting_group)


def _distributed() -> Any:
    from torch import distributed

    return distributed
