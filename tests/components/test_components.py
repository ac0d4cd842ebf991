from __future__ import annotations

import ast
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from shellv_core.stages import STAGE_NAMES
from shellv_core.stages.presets import PRESETS, stage_config, stage_module
from shellv_core.stages.runner import StageResult
from shellv_core.storage import Manifest, OutputDirectory

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = {"preset", "overrides", "task_overrides", "registered_model", "written"}


COUNTS = {"yes": {"yes": 5, "no": 2, "neither": 1}, "no": {"yes": 3, "no": 4, "neither": 0}}
CONFUSION = {"candidate": {"hal_eval": dict.fromkeys(("yes", "no"), dict.fromkeys(COUNTS["yes"], 9)), "pope": COUNTS}}


def component(stage: str) -> Any:
    return getattr(importlib.import_module(f"components.{stage}.component"), stage)


def is_artifact(parameter: inspect.Parameter) -> bool:
    return "dsl.Output[" in str(parameter.annotation) or hasattr(parameter.annotation, "__metadata__")


def call(stage: str, folder: Path, **values: Any) -> tuple[Any, dict[str, dsl.Artifact]]:
    """Run a component's function as kfp's executor does, with addresses and artifacts below `folder`."""
    function = component(stage).python_func
    arguments: dict[str, Any] = {"preset": "smoke", "overrides": [], "root_uri": folder.as_uri(), **values}
    artifacts = {}
    for name, parameter in inspect.signature(function).parameters.items():
        if is_artifact(parameter):
            kind = parameter.annotation.__origin__
            artifacts[name] = kind(name=name, uri=str(folder / "artifacts" / name), metadata={})
        elif name not in arguments and parameter.default is parameter.empty:
            arguments[name] = f"{folder.as_uri()}/{name}" if name.endswith("_uri") else name
    return function(**arguments, **artifacts), artifacts


@pytest.fixture
def configs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[Any]:
    """Stages that only record their config and commit one file; returns what they were given."""
    received: list[Any] = []
    for stage in STAGE_NAMES:

        def run(config: Any, stage: str = stage) -> StageResult:
            received.append(config)
            output = OutputDirectory((tmp_path / "output" / stage).as_uri(), "f" * 64)
            output.begin()
            output.put_bytes(b"<html></html>", "report.html")
            output.put_bytes(b"| % |", "summary.md")
            output.put_bytes(json.dumps({"confusion": CONFUSION}).encode(), "results.json")
            output.commit(Manifest(stage=stage, fingerprint="f" * 64, library_version="0", config={}))
            return StageResult(
                stage=stage,
                output_uri=output.uri,
                fingerprint="f" * 64,
                reused=False,
                metrics={"loss": 0.5},
                details={"num_steps": 3},
            )

        monkeypatch.setattr(stage_module(stage), "run", run)
    return received


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_component_runs_its_stage_with_its_own_config_and_refers_to_the_output(
    stage: str, configs: list[Any], tmp_path: Path
) -> None:
    returned, artifacts = call(stage, tmp_path, overrides=["seed=7"])
    (config,) = configs
    assert type(config) is type(getattr(PRESETS["smoke"](), stage))
    assert config.seed == 7
    assert config.output_uri == f"{tmp_path.as_uri()}/{stage}/{{fingerprint}}"
    assert returned == (tmp_path / "output" / stage).as_uri()
    for name, artifact in artifacts.items():
        content = Path(artifact.path).read_text(encoding="utf-8")
        if isinstance(artifact, dsl.HTML):
            assert content == "<html></html>"
        elif isinstance(artifact, dsl.Markdown):
            assert content == "| % |"
        elif isinstance(artifact, dsl.ClassificationMetrics):
            assert json.loads(content) == CONFUSION
            shown = artifact.metadata["confusionMatrix"]
            assert [each["displayName"] for each in shown["annotationSpecs"]] == ["yes", "no", "neither"]
            assert [row["row"] for row in shown["rows"]] == [[5, 2, 1], [3, 4, 0], [0, 0, 0]]
        elif isinstance(artifact, dsl.Metrics):
            assert artifact.metadata == json.loads(content) == {"loss": 0.5}
        else:
            reference = {"stage": stage, "output_uri": returned, "fingerprint": "f" * 64}
            assert artifact.metadata == reference, name
            assert json.loads(content) == {**reference, "metrics": {"loss": 0.5}, "details": {"num_steps": 3}}


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_every_address_that_a_component_takes_reaches_the_config(
    stage: str, configs: list[Any], tmp_path: Path
) -> None:
    call(stage, tmp_path)
    (config,) = configs
    parameters = inspect.signature(component(stage).python_func).parameters
    for name in parameters:
        if name.endswith("_uri") and name != "root_uri":
            assert getattr(config, name) == f"{tmp_path.as_uri()}/{name}"
    if "registered_model" in parameters:
        assert config.registered_model == "registered_model"


def test_the_overrides_of_a_task_win(configs: list[Any], tmp_path: Path) -> None:
    call("finetune", tmp_path, overrides=["finetune.hacl.weight=0.3"], task_overrides=["finetune.hacl.weight=0"])
    assert configs[0].hacl.weight == 0
    assert stage_config("smoke", "finetune").hacl.weight > 0


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_parameters_are_addresses_and_settings_never_hyperparameters(stage: str) -> None:
    parameters = inspect.signature(component(stage).python_func).parameters
    plain = {name for name, parameter in parameters.items() if not is_artifact(parameter)}
    assert {name for name in plain if not name.endswith("_uri")} <= SETTINGS


@pytest.mark.parametrize("stage", STAGE_NAMES)
def test_a_component_decides_nothing(stage: str) -> None:
    tree = ast.parse((REPOSITORY / "components" / stage / "component.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert stage in {function.name for function in functions}
    for function in functions:
        assert not [node for node in ast.walk(function) if isinstance(node, ast.If | ast.For | ast.While | ast.Try)]
        assert len(function.body) <= 15
