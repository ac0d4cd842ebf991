from __future__ import annotations

import ast
import importlib
import inspect
import json
from pathlib import Path
from typing import Any

import pytest
from kfp import dsl

from components.metadata import component_names, load, metadata
from shellv_core.errors import ConfigError
from shellv_core.stages import STAGE_NAMES
from shellv_core.stages.presets import PRESETS, stage_config, stage_module
from shellv_core.stages.runner import StageResult
from shellv_core.storage import InputDirectory, InputReference, Manifest, OutputDirectory

REPOSITORY = Path(__file__).resolve().parents[2]
SETTINGS = {
    *("preset", "overrides", "task_overrides", "registered_model", "written", "deploy_target", "cache_salt"),
    *("nodes", "pods"),
}


COUNTS = {"yes": {"yes": 5, "no": 2, "neither": 1}, "no": {"yes": 3, "no": 4, "neither": 0}}
CONFUSION = {"candidate": {"hal_eval": dict.fromkeys(("yes", "no"), dict.fromkeys(COUNTS["yes"], 9)), "pope": COUNTS}}
#: Optional inputs that only matter when they are given.
PASSED_ON = {"baseline_uri", "promotion_uri", "registered_model"}


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
        elif name not in arguments and (parameter.default is parameter.empty or name in PASSED_ON):
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
            output.begin(replace=output.finished() is not None)
            output.put_bytes(b"<html></html>", "report.html")
            output.put_bytes(b"| % |", "summary.md")
            output.put_bytes(json.dumps({"confusion": CONFUSION}).encode(), "results.json")
            inputs = {"data": InputReference(uri="s3://x/data", content_sha256="d" * 64)}
            output.commit(Manifest(stage=stage, fingerprint="f" * 64, library_version="0", config={}, inputs=inputs))
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
            output = InputDirectory(returned)
            reference = {
                "stage": stage,
                "output_uri": returned,
                "fingerprint": "f" * 64,
                "content_sha256": output.content_sha256,
                "library_version": "0",
                "num_files": 3,
                "num_bytes": sum(each.bytes for each in output.files()),
            }
            assert artifact.metadata == reference, name
            lineage = {"inputs": {"data": {"uri": "s3://x/data", "content_sha256": "d" * 64}}, "versions": {}}
            more = {"schema": 1, "metrics": {"loss": 0.5}, "details": {"num_steps": 3}}
            assert json.loads(content) == {**reference, **lineage, **more}


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


def test_an_empty_text_leaves_what_the_settings_say(configs: list[Any], tmp_path: Path) -> None:
    call("deploy", tmp_path, registered_model="", deploy_target="", overrides=["deploy.registered_model=mine"])
    call("deploy", tmp_path, registered_model="yours", deploy_target="service")
    assert [(each.registered_model, each.target) for each in configs] == [("mine", "local"), ("yours", "service")]


def test_training_goes_where_it_is_told(configs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launches = []

    def launched(stage: str, config: Any, launch: Any) -> StageResult:
        launches.append((stage, launch.nodes, launch.queue, launch.run_id, launch.image))
        return stage_module(stage).run(config)

    monkeypatch.setattr("shellv_core.stages.launch.run_training", launched)
    monkeypatch.setenv("KFP_RUN_ID", "r1")
    monkeypatch.setenv("SHELLV_IMAGE", "r.example/train:1")
    for stage in ("pretrain_projector", "finetune"):
        call(stage, tmp_path, nodes=2.0, pods={"queue": "mine"})
    assert [each[1:] for each in launches] == [(2, "mine", "r1", "r.example/train:1")] * 2


def test_another_library_than_compiled_with_is_refused_first(
    configs: list[Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHELLV_PIPELINE_VERSION", "0.0.1")
    monkeypatch.setenv("SHELLV_IMAGE", "r.example/control:9")
    for name in component_names():
        with pytest.raises(ConfigError, match=r"r.example/control:9 has version .* compiled with 0\.0\.1"):
            load(name).python_func(**dict.fromkeys(inspect.signature(load(name).python_func).parameters))
    assert not configs


@pytest.mark.parametrize("stage", component_names())
def test_a_component_decides_nothing(stage: str) -> None:
    tree = ast.parse((REPOSITORY / "components" / stage / "component.py").read_text())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    assert stage in {function.name for function in functions}
    for function in functions:
        assert not [node for node in ast.walk(function) if isinstance(node, ast.If | ast.For | ast.While | ast.Try)]
        assert len(function.body) <= 15


@pytest.mark.parametrize("name", component_names())
def test_a_component_has_its_folder_with_all_that_describes_it(name: str) -> None:
    assert metadata(name).name == name
    assert {path.name for path in (REPOSITORY / "components" / name).iterdir() if path.is_file()} == {
        *("__init__.py", "component.py", "component.yaml", "metadata.yaml", "README.md")
    }
    readme = (REPOSITORY / "components" / name / "README.md").read_text(encoding="utf-8")
    for parameter in inspect.signature(load(name).python_func).parameters:
        assert f"| `{parameter}` |" in readme
    assert "|  |\n" not in readme, "an input or output has no description"
    assert load(name).component_spec.implementation.container.image in readme


def test_inputs_are_addresses_so_that_equal_content_hits_the_cache() -> None:
    for name in component_names():
        interface = load(name).component_spec
        assert all("@" not in str(each.type) for each in interface.inputs.values()), "artifacts differ with every run"


def test_every_component_is_known() -> None:
    assert {"preflight", "check_training", "plan_data", "write_data", "report_run", *STAGE_NAMES} == set(
        component_names()
    )
    with pytest.raises(ConfigError, match="did you mean 'finetune'"):
        metadata("finetun")
