"""Presets: functions that return the full settings of all stages.

A preset holds everything but addresses, which the caller gives: pipeline parameters are URIs, a preset and overrides.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from typing import Any

from shellv_core.config import Config, apply_overrides, build_config, nearest
from shellv_core.errors import ConfigError
from shellv_core.stages import STAGE_NAMES
from shellv_core.stages.deploy import DeployConfig
from shellv_core.stages.evaluate import EvaluateConfig
from shellv_core.stages.finetune import FinetuneConfig
from shellv_core.stages.merge_lora import MergeLoraConfig
from shellv_core.stages.prepare_data import PrepareDataConfig
from shellv_core.stages.pretrain_projector import PretrainProjectorConfig
from shellv_core.stages.promote import PromoteConfig
from shellv_core.stages.runner import StageConfig


class Preset(Config):
    """The settings of the seven stages, addresses left open."""

    prepare_data: PrepareDataConfig
    pretrain_projector: PretrainProjectorConfig
    finetune: FinetuneConfig
    merge_lora: MergeLoraConfig
    evaluate: EvaluateConfig
    promote: PromoteConfig
    deploy: DeployConfig


PRESETS: dict[str, Callable[[], Preset]] = {}


def preset(name: str) -> Preset:
    """The preset called `name`.

    Raises:
        ConfigError: if there is none, with the nearest name.
    """
    if name not in PRESETS:
        raise ConfigError(f"unknown preset {name!r}; {nearest(name, PRESETS)}")
    return PRESETS[name]()


def stage_config(preset_name: str, stage: str, overrides: Sequence[str] = (), **values: Any) -> StageConfig:
    """The settings of one stage: the preset's, then the overrides addressed to it, then `values` (its addresses).

    Args:
        overrides: ``STAGE.key=value`` strings; those of other stages are checked and left out, and ``seed=N`` without
            a stage goes to every stage.

    Raises:
        ConfigError: for an unknown preset, stage or key, with the nearest name.
    """
    full = preset(preset_name)
    spread = [each for override in overrides for each in _spread(override)]
    full = apply_overrides(full, spread)
    config: StageConfig = getattr(full, stage)
    return build_config(type(config), {**config.model_dump(), **values})


def stage_module(name: str) -> Any:
    """The module of stage `name`, with its ``run``."""
    return importlib.import_module(f"shellv_core.stages.{name}")


def _spread(override: str) -> list[str]:
    return [f"{stage}.{override}" for stage in STAGE_NAMES] if override.startswith("seed=") else [override]
