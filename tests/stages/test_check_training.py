from __future__ import annotations

from typing import Any

import pytest

from pipelines.profile import gigabytes, read_profile
from shellv_core.errors import ConfigError
from shellv_core.stages.check_training import CheckTrainingConfig, run
from shellv_core.stages.launch import LaunchConfig


def check(**values: Any) -> list[str]:
    values = {"preset": "smoke", "accelerator_gb": 10.0, "scratch_gb": 10.0, "stages": ["finetune"], **values}
    return [f"{each.name}: {each.found}" for each in run(CheckTrainingConfig(**values))]


def test_what_fits_is_told_with_its_shares() -> None:
    launch = LaunchConfig(nodes=2, num_accelerators=4)
    memory, disk = check(stages=["prepare_data", "finetune", "evaluate"], num_accelerators=0, launch=launch)
    assert memory.startswith("finetune memory: about ")
    assert "of 10 GB on each of 8" in memory
    assert disk.startswith("finetune disk: about ")


def test_faults_come_together_with_settings_that_fit() -> None:
    large = ["finetune.training.micro_batch_size=256", "finetune.training.global_batch_size=256"]
    with pytest.raises(ConfigError) as caught:
        check(accelerator_gb=1.05, scratch_gb=0.001, overrides=large)
    first, memory, disk = str(caught.value).splitlines()
    assert first == "2 fault(s), and nothing was started:"
    assert "This fits: training.micro_batch_size=64" in memory
    assert "training.checkpoint_keep" in disk


@pytest.mark.slow
def test_where_nothing_fits_it_says_so() -> None:
    with pytest.raises(ConfigError, match="Nothing tried fits"):
        check(accelerator_gb=0.01)


def test_without_accelerators_there_is_nothing_to_check() -> None:
    assert check(accelerator_gb=0.0) == check(num_accelerators=0) == ["memory: no accelerator, nothing to check"]


def test_a_task_that_only_waits_for_a_job_holds_no_accelerator() -> None:
    with pytest.raises(ConfigError, match="k8s_training_accelerators=0"):
        check(num_accelerators=4, launch=LaunchConfig(nodes=2, num_accelerators=4))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a100-40", "a100-80", "h100"])
def test_the_defaults_of_a_profile_fit_its_nodes(name: str) -> None:
    profile = read_profile(name)
    training = profile.tasks.training
    findings = check(
        preset=profile.preset,
        overrides=profile.overrides,
        stages=["pretrain_projector", "finetune"],
        accelerator_gb=profile.accelerator_gb,
        num_accelerators=training.accelerators,
        scratch_gb=gigabytes(training.scratch),
    )
    assert len(findings) == 4
