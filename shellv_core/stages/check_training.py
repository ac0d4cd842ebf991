"""Whether training fits the memory and the disk of the nodes that it will get, told before one of them is taken."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

from pydantic import Field

from shellv_core.config import Config
from shellv_core.errors import ConfigError
from shellv_core.stages.launch import TRAINING_STAGES, LaunchConfig
from shellv_core.stages.preflight import GIGA, Finding, gather

if TYPE_CHECKING:
    from shellv_core.stages.estimate_command import Plan

#: A parameter, its gradient's place and AdamW's two moments, in float32: what a checkpoint holds of what learns.
CHECKPOINT_BYTES = 12


class CheckTrainingConfig(Config):
    """What training gets.

    Attributes:
        stages: the pipeline's; those that do not train are passed over.
        accelerator_gb: memory (10^9 bytes) of one accelerator; 0 for none, which checks nothing.
        num_accelerators: of each training task.
        launch: nodes that train together, and what the pods of a job on several of them get.
        scratch_gb: disk (10^9 bytes) of a node for checkpoints and models; 0 leaves that unchecked.
    """

    preset: str
    overrides: list[str] = []
    stages: list[str] = list(TRAINING_STAGES)
    accelerator_gb: float = Field(default=0.0, ge=0.0)
    num_accelerators: int = Field(default=1, ge=0)
    scratch_gb: float = Field(default=0.0, ge=0.0)
    launch: LaunchConfig = LaunchConfig()

    @property
    def num_devices(self) -> int:
        """Accelerators that share a step."""
        return self.launch.nodes * self.launch.num_accelerators if self.launch.nodes > 1 else self.num_accelerators


def run(config: CheckTrainingConfig) -> list[Finding]:
    """Estimate every training stage and hold it against what there is.

    Raises:
        ConfigError: with all faults at once, each with settings that fit where there are any.
    """
    if config.launch.nodes > 1 and config.num_accelerators:
        raise ConfigError(
            f"on {config.launch.nodes} nodes a training task only waits for the pods of its job, but would hold"
            f" {config.num_accelerators} accelerators meanwhile. Give k8s_training_accelerators=0; what the pods get is"
            " k8s_train_job's."
        )
    if not config.accelerator_gb or not config.num_devices:
        return [Finding(name="memory", found="no accelerator, nothing to check")]
    stages = [stage for stage in TRAINING_STAGES if stage in config.stages]
    checks = {f"{stage} memory": partial(_check_memory, config, stage) for stage in stages}
    if config.scratch_gb:
        checks |= {f"{stage} disk": partial(_check_disk, config, stage) for stage in stages}
    return gather(checks)


def _plan(config: CheckTrainingConfig, stage: str) -> Plan:
    from shellv_core.stages.estimate_command import Plan
    from shellv_core.stages.presets import stage_config

    settings: Any = stage_config(config.preset, stage, config.overrides)
    model = stage_config(config.preset, "pretrain_projector", config.overrides).model
    return Plan(
        model,
        settings.training,
        settings.hacl,
        getattr(settings, "lora", None),
        getattr(settings, "preference", None),
        config.num_devices,
        settings.training.zero_stage or 0,
    )


def _check_memory(config: CheckTrainingConfig, stage: str) -> str:
    from shellv_core.stages.estimate_command import alternatives, estimate
    from shellv_core.training.memory import TOLERANCE

    plan, capacity = _plan(config, stage), config.accelerator_gb * GIGA
    found = estimate(plan, "cuda")
    share = f"about {found.describe()} of {config.accelerator_gb:g} GB on each of {plan.num_devices}"
    if found.total <= capacity * (1 + TOLERANCE) or not plan.training.check_memory:
        return share
    fitting = next((change for change, each in alternatives(plan, "cuda") if each.total <= capacity), "")
    raise ConfigError(
        f"needs {share} accelerator(s). "
        + (f"This fits: {fitting}." if fitting else "Nothing tried fits; take more or larger accelerators.")
    )


def _check_disk(config: CheckTrainingConfig, stage: str) -> str:
    from shellv_core.stages.estimate_command import module_of

    plan = _plan(config, stage)
    parameters = list(module_of(plan).parameters())
    weights = sum(each.numel() * each.element_size() for each in parameters)
    learning = sum(each.numel() for each in parameters if each.requires_grad)
    # The newest is written while the others are still there. Weights: as they were, and as they will be.
    checkpoints = (plan.training.checkpoint_keep + 1) * learning * CHECKPOINT_BYTES
    need = (2 * weights + checkpoints) / GIGA
    share = f"about {need:.1f} GB of checkpoints and weights, on {config.scratch_gb:g} GB"
    if need > config.scratch_gb:
        raise ConfigError(
            f"needs {share} of scratch space. Give the training tasks a larger scratch volume in the profile, or keep"
            " fewer checkpoints (training.checkpoint_keep)."
        )
    return share
