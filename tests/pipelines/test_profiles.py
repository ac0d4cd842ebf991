from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.profile import DEPLOY_TARGETS, gigabytes, profile_names, read_profile
from shellv_core.errors import ConfigError
from shellv_core.stages.deployers import DEPLOYERS
from shellv_core.stages.launch import LaunchConfig
from shellv_core.stages.presets import stage_config

WRONG = {
    "acelerator: x": "did you mean 'accelerator'",
    "preset: nan": "did you mean 'nano'",
    "name: other": "leave out name",
    "tasks: {training: {memory: 6GB}}": "tasks.training.memory='6GB'",
    "tasks: {traning: {}}": "did you mean 'training'",
    "tasks: {training: {accelerators: 2}}": "needs accelerator_gb",
    "tasks: {training: {timeout_hours: 0}}": "tasks.training.timeout_hours=0",
    "tasks: {evaluation: {shared_memory: null}}": "/dev/shm",
    "tolerations: [{operator: Exists, value: x}]": "Exists takes no value",
    "tolerations: [{operator: Exist}]": "'Exist'",
    "secret: Not_A_Name": "secret='Not_A_Name'",
    "user: 0": "user=0",
    "deploy_target: moon": "deploy_target='moon'",
    "node_selector: [x]": "node_selector",
}


def test_there_is_one_for_each_cluster() -> None:
    assert profile_names() == ["a100-40", "a100-80", "cpu", "h100"]


@pytest.mark.parametrize("name", ["a100-40", "a100-80", "cpu", "h100"])
def test_defaults_are_settings_that_stages_and_jobs_take(name: str) -> None:
    profile = read_profile(name)
    stage_config(profile.preset, "finetune", profile.overrides)
    job = LaunchConfig(nodes=2, **profile.train_job())
    assert job.num_accelerators == profile.tasks.training.accelerators
    assert job.tolerations == profile.toleration_values()


@pytest.mark.parametrize(("text", "message"), WRONG.items())
def test_a_wrong_profile_is_refused_with_what_is_wrong(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        read_profile(str(path))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_of_one_s_own_states_differences(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("queue: mine\ntasks: {data: {scratch: 1Ti}}\n")
    profile = read_profile(str(path))
    assert profile.name == "mine"
    assert profile.tasks.data.scratch == "1Ti"
    assert profile.tasks.data.memory == read_profile("cpu").tasks.data.model_copy(update={"memory": "8Gi"}).memory
    with pytest.raises(ConfigError, match="unknown profile"):
        read_profile(str(tmp_path / "none.yaml"))


def test_places_to_deploy_to_are_the_stage_s() -> None:
    assert ("", *DEPLOYERS) == DEPLOY_TARGETS


def test_sizes_are_kubernetes_s() -> None:
    assert gigabytes("1Gi") == pytest.approx(1.073741824)
    assert gigabytes("5G") == 5
    assert gigabytes("2Ti") == pytest.approx(2 * 1.099511627776e3)
