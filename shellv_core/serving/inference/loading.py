"""A served model from its directory: number format, quantization, devices and adapters."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from shellv_core.config import nearest
from shellv_core.errors import ServingError
from shellv_core.models.config import Quantization
from shellv_core.serving.inference.adapters import AdapterSet
from shellv_core.serving.reference import ModelFiles

Dtype = Literal["float32", "bfloat16", "float16"]
#: Spreads one model over all GPUs.
AUTO = "auto"
DEVICES = ("cpu", "cuda", "mps", AUTO)


def load_served(
    directory: Path,
    device: str = "cpu",
    dtype: Dtype = "float32",
    quantization: Quantization | None = None,
    adapters: Mapping[str, ModelFiles] | None = None,
) -> tuple[Any, Any, AdapterSet]:
    """Model in evaluation mode, processor, and the adapters on the model.

    Args:
        device: as torch spells it, or ``auto`` for all GPUs of this machine together.
        dtype: of the weights that are not quantized, and of what is computed.
        quantization: of the language model's linear layers, made while loading.
        adapters: unmerged LoRA adapters by the name that requests give.

    Raises:
        ServingError: if there is no such device.
        ConfigError: if bitsandbytes is needed and missing.
        ModelError: if the model or an adapter cannot be loaded, or they do not belong together.
    """
    import torch

    from shellv_core.models.compose import load_model

    _check_device(device)
    number_format = getattr(torch, dtype)
    # Quantized weights are made where they stay; others are moved, which loads faster.
    placed = device == AUTO or quantization is not None
    device_map: Any = None if not placed else AUTO if device == AUTO else {"": device}
    model: Any
    model, processor = load_model(directory, number_format, quantization, number_format, device_map)
    if not placed:
        model = model.to(device)
    files = adapters or {}
    adapter_set = AdapterSet(
        model,
        {name: each.path for name, each in files.items()},
        {name: each.revision for name, each in files.items()},
    )
    if not placed:
        model.to(device)
    return model.eval(), processor, adapter_set


def _check_device(device: str) -> None:
    import torch

    kind = device.partition(":")[0]
    present = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
        AUTO: torch.cuda.is_available(),
    }
    if kind not in present:
        raise ServingError(f"device {device!r} is unknown; {nearest(kind, DEVICES)}")
    if not present[kind]:
        there = ", ".join(name for name, available in present.items() if available)
        raise ServingError(f"device {device!r} is not there; this machine has: {there}.")
