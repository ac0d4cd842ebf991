"""The weight of an objective as a function of the step."""

from __future__ import annotations

import math
from typing import Literal

WeightSchedule = Literal["constant", "linear", "cosine"]


def weight_factor(step: int, total: int, schedule: WeightSchedule, warmup_ratio: float) -> float:
    """Factor (0..1) of the weight in `step` (from 1) of `total`.

    constant: 1. linear: rises in equal parts over the first ``ceil(total * warmup_ratio)`` steps and stays at 1.
    cosine: rises likewise, then falls to 0 as half a cosine, which it reaches in the last step.
    """
    if schedule == "constant":
        return 1.0
    warmup = math.ceil(total * warmup_ratio)
    if step <= warmup:
        return step / warmup
    if schedule == "linear":
        return 1.0
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(total - warmup, 1)))
