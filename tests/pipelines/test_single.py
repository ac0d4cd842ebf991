from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from components.metadata import component_names
from pipelines.__main__ import main
from pipelines.compile import compiled_definition
from pipelines.profile import read_profile
from pipelines.single import arguments, single
from shellv_core.errors import ConfigError
from tests.pipelines.compiling import tasks_of
from tests.pipelines.test_compiled_strictly import parse_strictly

ALONE = [name for name in component_names() if name != "report_run"]


@pytest.mark.parametrize("name", ALONE)
def test_every_component_alone_is_a_pipeline_with_its_placement(name: str) -> None:
    spec, platform = yaml.safe_load_all(compiled_definition(single(name), read_profile("h100")))
    parse_strictly(spec, platform)
    (task,) = tasks_of(spec, platform)
    assert task.facts.name == name
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    given = {key for key in task.spec["inputs"]["parameters"] if not key.startswith("pipelinechannel")}
    assert given - {"pods", "accelerator_count", "accelerator_type"} <= set(parameters)
    assert ("k8s_node_selector" in parameters) == (task.facts.kind in ("training", "evaluation"))
    if "preset" in parameters:
        assert parameters["preset"]["defaultValue"] == "shellv-7b"


def test_a_report_has_no_meaning_alone(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["component", "report_run"]) == 2
    assert "no meaning alone" in capsys.readouterr().err


def test_inputs_are_checked_before_anything_runs() -> None:
    with pytest.raises(ConfigError) as caught:
        arguments("check_training", ["stages=finetune", "scratch_b=1", "accelerator_gb=x", "nodes"])
    for part in (
        "stages='finetune': a value of type list",
        "did you mean 'scratch_gb'",
        "accelerator_gb='x': a value of type float",
        "'nodes': give key=value",
        "num_accelerators is required",
    ):
        assert part in str(caught.value)
    given = ["accelerator_gb=1", "scratch_gb=2.5", "num_accelerators=8", "stages=[finetune]", "preset=nano"]
    assert arguments("check_training", given) == {
        "accelerator_gb": 1.0,
        "scratch_gb": 2.5,
        "num_accelerators": "8",
        "stages": ["finetune"],
        "preset": "nano",
    }


def test_one_runs_here_and_is_written_for_the_ui(
    tmp_path: Path, project_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "alone.yaml"
    command = ["component", "plan_data", "-o", str(path), "--run", f"root_uri={(tmp_path / 'root').as_uri()}"]
    assert main([*command, "preset=smoke", "num_ranges=2"]) == 0
    assert next(yaml.safe_load_all(path.read_text()))["pipelineInfo"]["name"] == "shellv-plan-data"
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "[1/1] plan_data"
    assert lines[-1].startswith("['")
