"""How much memory there is for keys and values, and what one token of them takes."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from shellv_core.errors import ServingError
from shellv_core.serving.inference.cache import pages

if TYPE_CHECKING:
    import torch

GIB = 1 << 30
#: Of the memory that is free once the model is loaded; the rest is for activations and whatever else runs.
SHARE_OF_GPU, SHARE_OF_CPU = 0.85, 0.5
CGROUP = Path("/sys/fs/cgroup")
OUT_OF_MEMORY_MESSAGES = ("DefaultCPUAllocator", "out of memory")


def bytes_per_token(model: Any) -> int:
    """Bytes that one token's keys and values take in all layers."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_dim * model.dtype.itemsize)


def kv_capacity(model: Any, slots: int, context_length: int, limit_gib: float | None) -> int:
    """Tokens that the cache may hold, in whole pages.

    Args:
        limit_gib: memory for keys and values; None for a share of what is free.

    Raises:
        ServingError: if not one sequence of `context_length` fits.
    """
    per_token, wanted = bytes_per_token(model), slots * pages(context_length)
    allowed = free_bytes(model.device) if limit_gib is None else int(limit_gib * GIB)
    capacity = min(wanted, allowed // per_token)
    if capacity < pages(context_length):
        least = pages(context_length) * per_token
        raise ServingError(
            f"keys and values of one request of {context_length} tokens take {least / GIB:.2f} GiB, but"
            f" {allowed / GIB:.2f} GiB are there for them; lower engine.context_length, raise engine.kv_cache_gib, or"
            " quantize the model."
        )
    return capacity


def free_bytes(device: torch.device) -> int:
    """Bytes on `device` that keys and values may take."""
    return int((SHARE_OF_GPU if device.type == "cuda" else SHARE_OF_CPU) * free_memory(device))


def free_memory(device: torch.device) -> int:
    """Bytes that are free on `device`."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return _free_ram()


def _free_ram() -> int:
    free = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    with contextlib.suppress(OSError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = int(next(line for line in lines if line.startswith("MemAvailable:")).split()[1]) << 10
    # Absent outside of a container, and "max" in one without a limit.
    with contextlib.suppress(OSError, ValueError):
        limit, used = (int((CGROUP / name).read_text()) for name in ("memory.max", "memory.current"))
        free = min(free, limit - used)
    return max(free, 0)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` says that an allocation failed, on whatever device."""
    import torch

    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(text in str(error) for text in OUT_OF_MEMORY_MESSAGES)
