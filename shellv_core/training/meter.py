"""What a run measures of itself: losses, rates, memory."""

from __future__ import annotations

import resource
import sys
import time

import numpy as np
import torch

from shellv_core.training.batches import Batch
from shellv_core.training.flops import FlopFormula, device_peak
from shellv_core.training.packed import PackedRow

SUMMARY_STEPS = 50
GIGA = 1e9


class Meter:
    """Counts of a run, and losses since the last log line and over the last steps.

    Args:
        formula: for the share of the device's peak; None leaves it out.
        num_devices: over which what is counted was spread.
    """

    def __init__(self, device: torch.device, formula: FlopFormula | None = None, num_devices: int = 1) -> None:
        self.device, self.formula, self.num_devices = device, formula, num_devices
        self.peak = device_peak(device) if formula else None
        self.samples = self.tokens = self.slots = self.flops = 0.0
        self.recent: list[dict[str, float]] = []
        self.start = time.monotonic()

    def counts(self, batch: Batch | PackedRow) -> tuple[float, float, float, float]:
        """Samples, tokens, tokens with padding and useful operations of a forward and backward pass, for `count`."""
        flops = self.formula.of(batch).total if self.formula else 0.0
        return batch.num_samples, batch.num_tokens, batch.num_slots, flops

    def count(self, samples: float, tokens: float, slots: float, flops: float) -> None:
        """Count what was done."""
        self.samples += samples
        self.tokens += tokens
        self.slots += slots
        self.flops += flops

    def add(self, losses: dict[str, float]) -> None:
        """Take the losses of an optimizer step."""
        self.recent = [*self.recent[1 - SUMMARY_STEPS :], losses]

    def losses(self, num_steps: int) -> dict[str, float]:
        """Means over the last `num_steps` steps, at most `SUMMARY_STEPS`."""
        recent = self.recent[-num_steps:]
        keys = sorted({key for losses in recent for key in losses})
        return {key: float(np.mean([losses[key] for losses in recent if key in losses])) for key in keys}

    def rates(self, seconds_waited: float | None) -> dict[str, float]:
        """Rates from the start of this process's run on.

        Args:
            seconds_waited: for data; None if nothing was made ahead.

        Returns:
            samples_per_second, tokens_per_second (without padding), useful_token_share (of what was computed or, with
            packing, of the packs' room), peak_memory_gb (10^9 bytes: on a GPU allocated there, else the process's
            resident set); where they are known, mfu (useful operations of the device's peak, 0..1) and
            data_wait_share (of the time).
        """
        seconds = max(time.monotonic() - self.start, 1e-9)
        rates = {
            "samples_per_second": self.samples / seconds,
            "tokens_per_second": self.tokens / seconds,
            "useful_token_share": self.tokens / max(self.slots, 1),
            "peak_memory_gb": peak_memory(self.device) / GIGA,
        }
        if self.peak:
            rates["mfu"] = self.flops / seconds / (self.peak * self.num_devices)
        if seconds_waited is not None:
            rates["data_wait_share"] = seconds_waited / seconds
        return rates


def peak_memory(device: torch.device) -> int:
    """The most bytes in use so far: allocated on a GPU, else the process's resident set."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    # In KiB, except on macOS.
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
