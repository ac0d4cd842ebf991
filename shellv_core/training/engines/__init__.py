"""What computes the steps of a run: plain or data-parallel training, or DeepSpeed's ZeRO."""

from __future__ import annotations

from shellv_core.training.config import TrainingConfig
from shellv_core.training.engines.base import Engine
from shellv_core.training.engines.ddp import DDPEngine
from shellv_core.training.model import TrainingModel


def make_engine(module: TrainingModel, config: TrainingConfig) -> Engine:
    """The engine that `config` asks for, around `module`.

    Raises:
        TrainingError: if nothing is trainable, or the engine is not the one that was asked for.
    """
    if config.engine == "deepspeed":
        from shellv_core.training.engines.deepspeed import ZeroEngine

        return ZeroEngine(module, config)
    return DDPEngine(module, config)
