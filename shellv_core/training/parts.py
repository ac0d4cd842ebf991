"""The parts of a model in training: how much of each there is, what learns and how fast."""

from __future__ import annotations

import math
from typing import Literal

from torch import nn

from shellv_core.training.config import TrainingConfig
from shellv_core.training.model import TrainingModel

PartName = Literal["vision tower", "projector", "language model", "adapters", "heads", "reference"]
COLUMNS = ("part", "parameters", "trainable", "dtype", "learning rate")


def part_of(name: str) -> PartName:
    """The part that a parameter belongs to, by its name in a `TrainingModel`."""
    if name.startswith("heads."):
        return "heads"
    # What a part was before it had adapters is a reference, as the frozen copy is.
    if name.startswith("reference.") or ".original_module." in name:
        return "reference"
    if ".lora_" in name:
        return "adapters"
    if ".multi_modal_projector." in name:
        return "projector"
    return "vision tower" if ".vision_tower." in name else "language model"


def learn_in_float32(module: nn.Module) -> None:
    """Hold what learns in float32; a small step would be lost in what bfloat16 rounds to."""
    for parameter in module.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.float()


def learning_rates(module: TrainingModel, config: TrainingConfig) -> dict[PartName, float]:
    """The learning rate, before its schedule, of each part that can learn."""
    return {
        "projector": config.projector_learning_rate,
        "language model": config.language_model_learning_rate,
        "adapters": config.language_model_learning_rate,
        "heads": module.hacl.learning_rate,
    }


def describe_parts(module: TrainingModel, config: TrainingConfig) -> str:
    """A table with a line for each part: parameters, how many of them learn, dtypes, learning rate."""
    parts: dict[PartName, list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        parts.setdefault(part_of(name), []).append(parameter)
    rates = learning_rates(module, config)
    rows = [COLUMNS]
    for part, parameters in parts.items():
        trainable = sum(_count(each) for each in parameters if each.requires_grad)
        sizes: dict[str, int] = {}
        for each in parameters:
            sizes[_dtype(each)] = sizes.get(_dtype(each), 0) + _count(each)
        dtypes = ", ".join(sorted(sizes, key=lambda dtype: -sizes[dtype]))
        rate = f"{rates[part]:g}" if trainable else "frozen"
        rows.append((part, f"{sum(sizes.values()):,}", f"{trainable:,}", dtypes, rate))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    aligned = [
        [cell.rjust(width) if column in (1, 2) else cell.ljust(width) for column, (cell, width) in enumerate(cells)]
        for cells in (list(zip(row, widths, strict=True)) for row in rows)
    ]
    return "\n".join("  ".join(cells).rstrip() for cells in aligned)


def _count(parameter: nn.Parameter) -> int:
    """Of a 4-bit parameter, what it was quantized from: two share a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)


def _dtype(parameter: nn.Parameter) -> str:
    state = getattr(parameter, "quant_state", None)
    return str(parameter.dtype).removeprefix("torch.") if state is None else str(state.quant_type)
