"""How much memory a run takes, before it starts: counted, not measured.

The largest forward and backward pass of the run is made once with tensors that have shapes and no data, and every
tensor that is made counts while it lives. So what attention, adapters, autocast, checkpointing and the contrast keep is
what the real pass keeps, whatever the architecture. Weights, gradients and the optimizer's state come from the
parameters and the ZeRO stage.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from shellv_core.errors import ConfigError
from shellv_core.logs import get_logger
from shellv_core.training.batches import Batch
from shellv_core.training.config import TrainingConfig
from shellv_core.training.examples import Examples
from shellv_core.training.memory_batches import largest_batch
from shellv_core.training.memory_pass import is_frozen, pass_parts
from shellv_core.training.model import TrainingModel
from shellv_core.training.packed import PackedRow

logger = get_logger(__name__)
GIGA = 1e9
FLOAT32 = 4
#: Usable bytes of devices, as their drivers report them.
DEVICES = {"a100-40": 42.3e9, "a100-80": 85.0e9, "h100": 85.0e9, "h200": 150.0e9}
#: What a process takes on a GPU beside torch's tensors, and what torch's allocator takes beside them, of the pass.
CUDA_CONTEXT, CUDA_FRAGMENTS = 0.7e9, 0.05
#: DeepSpeed's default: elements that are sent together, and weights that stage 3 holds whole at a time.
ZERO_BUCKET, ZERO3_LIVE = 500_000_000, 1_000_000_000
#: How far the estimate may be off; only beyond that is a run refused.
TOLERANCE = 0.15
#: Bytes per weight of linear layers in QLoRA, with their constants.
QUANTIZED_BYTES = {"nf4": 0.516, "int8": 1.0}


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device at the highest point of a run.

    Attributes:
        weights: of all parts, and buffers.
        gradients: as they are from the second of several passes on, and while they are averaged.
        optimizer: AdamW's two moments, under ZeRO the weights' float32 copies too.
        buffers: what DeepSpeed gathers and sends at a time.
        layers: of the pass, what the language model's layers keep, autocast's copies of weights included.
        logits: of the pass, what is between the layers and the loss.
        contrast: of the pass, what the objectives beside the generation loss run apart: captions and hallucinated
            captions in padded form (in a pack they are the layers'), and a preference's answers.
        vision: pictures' features, or the tower's pass where that is the highest point.
        overhead: of the allocator and the CUDA context.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    layers: float
    logits: float
    contrast: float
    vision: float
    overhead: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())

    def describe(self) -> str:
        """One line, in GB (10^9 bytes)."""
        parts = ", ".join(f"{name} {_gb(value)}" for name, value in vars(self).items() if value >= 0.005 * self.total)
        return f"{_gb(self.total)} GB ({parts})"


def estimate_memory(
    module: TrainingModel,
    config: TrainingConfig,
    batch: Batch | PackedRow,
    device_type: str = "cuda",
    num_devices: int = 1,
    zero_stage: int = 0,
    quantization: str | None = None,
) -> MemoryEstimate:
    """The memory that training takes on each device.

    Args:
        module: as it will be trained, adapters in place; its tensors may be on the meta device.
        batch: the largest; its tensors may be on the meta device too. See `largest_batch`.
        device_type: "cuda" or "cpu".
        zero_stage: 0 for DDP, or plain training on one device.
        quantization: count frozen linear layers as if they were quantized so ("nf4", "int8"); none that is so already.
    """
    state = _state(module, num_devices, zero_stage, quantization)
    parts = pass_parts(module, config, batch, device_type, quantization is not None)
    dynamic = sum(parts.values())
    overhead = CUDA_CONTEXT + CUDA_FRAGMENTS * dynamic if device_type == "cuda" else 0.0
    return MemoryEstimate(**state, **parts, overhead=overhead)


def check_memory(
    module: TrainingModel,
    config: TrainingConfig,
    examples: Examples | None = None,
    pack: tuple[int, int] | None = None,
    num_devices: int = 1,
    zero_stage: int = 0,
) -> MemoryEstimate:
    """Log what a run will take against what its device has.

    Args:
        examples, pack: see `largest_batch`.

    Raises:
        ConfigError: if it cannot fit, the estimate's tolerance granted, and `config.check_memory` is on.
    """
    device = module.model.device
    batch = largest_batch(module, config, examples, pack, num_devices)
    estimate = estimate_memory(module, config, batch, device.type, num_devices, zero_stage)
    capacity = device_memory(device)
    logger.info("memory: about %s of %s GB on %s", estimate.describe(), _gb(capacity), device)
    if estimate.total <= capacity:
        return estimate
    message = (
        f"training needs about {_gb(estimate.total)} GB on {device}, which has {_gb(capacity)} GB. Lower"
        " training.micro_batch_size (or training.pack_tokens with packing), set training.gradient_checkpointing=true,"
        " train adapters (lora), share states among more devices (training.engine=deepspeed, training.zero_stage), or"
        " see `shellv estimate`."
    )
    if config.check_memory and estimate.total > (1 + TOLERANCE) * capacity:
        raise ConfigError(f"{message} Set training.check_memory=false to try all the same.")
    logger.warning("%s", message)
    return estimate


def device_memory(device: torch.device) -> int:
    """Bytes that a process may use on `device`: all of a GPU, or the machine's or container's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int((Path("/sys/fs/cgroup") / name).read_text()))
    return total


def _state(module: TrainingModel, num_devices: int, zero_stage: int, quantization: str | None) -> dict[str, float]:
    """Bytes of what outlasts a pass."""
    quantized = set()
    if quantization:
        layers = module.model.model.language_model.modules()
        quantized = {id(each.weight) for each in layers if isinstance(each, nn.Linear) and is_frozen(each)}
    whole = shared = learning = 0.0
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        size = tensor.numel() * float(tensor.element_size())
        if id(tensor) in quantized:
            size = tensor.numel() * QUANTIZED_BYTES[quantization or ""]
        # DeepSpeed leaves the tower, and buffers, whole.
        if isinstance(tensor, nn.Parameter) and ".vision_tower." not in name:
            shared += size
        else:
            whole += size
        learning += tensor.numel() * FLOAT32 * tensor.requires_grad
    elements = learning / FLOAT32
    if not zero_stage:
        gradients = learning * (2 if num_devices > 1 else 1)  # DDP's buckets are copies
        return {"weights": whole + shared, "gradients": gradients, "optimizer": 2 * learning, "buffers": 0.0}
    buffers = min(elements, ZERO_BUCKET) * FLOAT32
    if zero_stage == 3:
        buffers += min(shared / FLOAT32, ZERO3_LIVE) * FLOAT32
    return {
        "weights": whole + shared / (num_devices if zero_stage == 3 else 1),
        "gradients": learning / (num_devices if zero_stage >= 2 else 1),
        "optimizer": 3 * learning / num_devices,
        "buffers": buffers,
    }


def _gb(value: float) -> str:
    return f"{value / GIGA:.3g}" if value < 10 * GIGA else f"{value / GIGA:.1f}"
