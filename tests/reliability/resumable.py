"""Tiny runs in processes that may be killed; forked from one that has imported and built everything already."""

from __future__ import annotations

import copy
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import mlflow.tracking  # noqa: F401 - loaded once for all runs
import torch
from safetensors.torch import save_file

from shellv_core.cli import main
from shellv_core.models.config import LoraConfig
from shellv_core.models.hacl import HaclHeads
from shellv_core.models.lora import add_lora
from shellv_core.storage import InputDirectory
from shellv_core.training.config import HaclConfig, TrainingConfig
from shellv_core.training.fit import TrainingData, fit
from shellv_core.training.loop import set_trainable
from shellv_core.training.model import TrainingModel
from tests.training.tiny import CLIP, tiny_model, tiny_samples

SAMPLES = tiny_samples(24)
STEPS = 60
EVERY = 3
MODEL, PROCESSOR = tiny_model(CLIP, samples=SAMPLES)


@dataclass(frozen=True)
class Kill:
    """SIGKILL after the first step from `step` on.

    It comes `seconds` later, or `seconds` after a checkpoint is begun to be written.
    """

    step: int
    seconds: float
    while_writing: bool = False


def train(
    environment: Mapping[str, str],
    data_uri: str,
    packing: bool,
    work: Path,
    address: str | None = None,
    kill: Kill | None = None,
    stop: int | None = None,
) -> None:
    """Train in `work` and leave ``final.safetensors`` there.

    Args:
        stop: send SIGTERM in this step.
    """
    _prepare(environment)
    config = TrainingConfig(
        global_batch_size=6,
        max_steps=STEPS,
        trainable=("projector", "language_model"),
        language_model_learning_rate=1e-2,
        max_length=256,
        packing=packing,
        pack_tokens=256,
        checkpoint_every_steps=EVERY,
        log_every_steps=1,
    )
    torch.manual_seed(0)
    module = TrainingModel(copy.deepcopy(MODEL), HaclHeads(32), HaclConfig(weight=0.5, queue_size=32))
    set_trainable(module, config)
    add_lora(module.model, LoraConfig(r=2, dropout=0.2))
    steps: list[int] = []

    def log(metrics: dict[str, float], step: int) -> None:
        # A run that was killed late may have gone beyond the next one's step.
        due = kill is not None and step >= kill.step and all(each < kill.step for each in steps)
        steps.append(step)
        if due:
            threading.Thread(target=_kill, args=(kill, work / "checkpoints"), daemon=True).start()
        if step == stop:
            os.kill(os.getpid(), signal.SIGTERM)

    data = TrainingData.of(InputDirectory(data_uri), "train")
    fit(module, PROCESSOR, data, config, 0, work, log, "test", checkpoint_address=address)
    (work / "steps").write_text(f"{len(steps)}")
    save_file({name: value.contiguous() for name, value in module.state_dict().items()}, work / "final.safetensors")


def program(environment: Mapping[str, str], arguments: list[str], output: Path) -> None:
    """``shellv ARGUMENTS``, what it says in the file `output`."""
    _prepare(environment)
    with output.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
        sys.stdout = sys.stderr = file
        sys.exit(main(arguments))


def start(target: Callable[..., None], *arguments: Any) -> BaseProcess:
    """Start one of the functions above in a process of its own."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=target, args=arguments)
    process.start()
    return process


def run(target: Callable[..., None], *arguments: Any) -> int | None:
    """Like `start`, and its exit code; negative if a signal ended it."""
    process = start(target, *arguments)
    process.join(timeout=240)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def _kill(kill: Kill, checkpoints: Path) -> None:
    while kill.while_writing and not any(checkpoints.glob(".step-*.tmp")):
        time.sleep(0.0005)
    time.sleep(kill.seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def _prepare(environment: Mapping[str, str]) -> None:
    # The parent's environment is that of the moment when it was started.
    os.environ.update(environment)
    torch.set_num_threads(1)
