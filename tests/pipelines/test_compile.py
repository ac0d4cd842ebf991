from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from google.protobuf import json_format

from pipelines.compile import PIPELINES, compiled_path
from shellv_core.stages import STAGE_NAMES
from shellv_core.stages.presets import PRESETS

REPOSITORY = Path(__file__).resolve().parents[2]
# Kubeflow Pipelines refuses specifications above 256 KB in some installations.
MAX_BYTES = 200_000
UNSUPPORTED_LOCALLY = ("pipeline_job_resource_name", "pipeline_job_create_time", "pipeline_job_schedule_time")
PARAMETERS = {
    "root_uri",
    "preset",
    "overrides",
    "registered_model",
    "k8s_secret",
    "k8s_config_map",
    "k8s_accelerator",
    "k8s_num_accelerators",
    "k8s_node_selector",
    "k8s_tolerations",
}


def compiled(name: str = "shellv", **environment: str) -> str:
    """A compiled pipeline, from a process of its own: images are named when the components are imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SHELLV_")}
    program = f"from pipelines.compile import compiled_yaml; print(compiled_yaml({name!r}), end='')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def documents() -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(compiled_path("shellv").read_text(encoding="utf-8")))


@pytest.fixture(scope="module")
def spec(documents: list[dict[str, Any]]) -> dict[str, Any]:
    return documents[0]


@pytest.fixture(scope="module")
def containers(spec: dict[str, Any]) -> dict[str, dict[str, Any]]:
    return {name: each["container"] for name, each in spec["deploymentSpec"]["executors"].items()}


@pytest.mark.parametrize("name", PIPELINES)
def test_the_committed_file_is_what_the_source_compiles_to(name: str) -> None:
    assert compiled_path(name).read_text(encoding="utf-8") == compiled(name), "run `python -m pipelines compile`"


def test_compiling_is_deterministic() -> None:
    assert compiled(PYTHONHASHSEED="1") == compiled(PYTHONHASHSEED="2")


def test_both_documents_parse_strictly(documents: list[dict[str, Any]]) -> None:
    from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
    from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec

    spec, platform = documents
    json_format.ParseDict(spec, PipelineSpec())
    json_format.ParseDict(platform, PlatformSpec())
    for executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(executor, KubernetesExecutorConfig())


def test_images_come_from_one_place(containers: dict[str, dict[str, Any]]) -> None:
    import shellv_core

    tag = shellv_core.__version__
    assert {each["image"] for each in containers.values()} == {
        f"localhost/shellv-control:{tag}",
        f"localhost/shellv-train:{tag}",
    }
    other = compiled(SHELLV_REGISTRY="registry.example/team/", SHELLV_TAG="abc")
    images = {
        each["container"]["image"] for each in next(yaml.safe_load_all(other))["deploymentSpec"]["executors"].values()
    }
    assert images == {"registry.example/team/shellv-control:abc", "registry.example/team/shellv-train:abc"}


def test_nothing_is_installed_at_run_time(containers: dict[str, dict[str, Any]]) -> None:
    for container in containers.values():
        command = " ".join([*container["command"], *container["args"]])
        assert "pip" not in command.replace("pipeline", "")


@pytest.mark.parametrize("name", PIPELINES)
def test_the_file_is_small_and_runs_anywhere(name: str) -> None:
    text = compiled_path(name).read_text(encoding="utf-8")
    assert len(text.encode()) < MAX_BYTES
    for placeholder in UNSUPPORTED_LOCALLY:
        assert placeholder not in text


def test_parameters_are_addresses_a_preset_overrides_and_placement(spec: dict[str, Any]) -> None:
    parameters = spec["root"]["inputDefinitions"]["parameters"]
    assert set(parameters) == PARAMETERS
    assert parameters["preset"]["literals"] == list(PRESETS)
    for name, parameter in parameters.items():
        assert parameter["description"], name
        assert parameter.get("isOptional", False) == (name != "root_uri")


def test_every_stage_is_in_the_pipeline_and_finetune_and_merge_twice(spec: dict[str, Any]) -> None:
    functions = [each["container"]["args"][-1] for each in spec["deploymentSpec"]["executors"].values()]
    assert sorted(functions) == sorted([*STAGE_NAMES, "finetune", "merge_lora"])
    overrides = [
        task["inputs"]["parameters"]["task_overrides"]["runtimeValue"]["constant"]
        for task in spec["root"]["dag"]["tasks"].values()
        if "task_overrides" in task["inputs"]["parameters"]
    ]
    assert sorted(overrides) == [[], ["finetune.hacl.weight=0"]]


def test_what_looks_outside_its_inputs_is_never_cached(spec: dict[str, Any]) -> None:
    uncached = {
        name for name, task in spec["root"]["dag"]["tasks"].items() if not task["cachingOptions"].get("enableCache")
    }
    assert uncached == {"prepare-data", "promote", "deploy"}


def test_every_task_that_loads_a_model_can_be_placed_and_is_retried(documents: list[dict[str, Any]]) -> None:
    spec, platform = documents
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    accelerated = {
        name: each["container"]
        for name, each in spec["deploymentSpec"]["executors"].items()
        if "resources" in each["container"]
    }
    assert sorted(each["args"][-1] for each in accelerated.values()) == [
        "evaluate",
        "finetune",
        "finetune",
        "merge_lora",
        "merge_lora",
        "pretrain_projector",
    ]
    tasks = {task["componentRef"]["name"]: task for task in spec["root"]["dag"]["tasks"].values()}
    for name in accelerated:
        place = executors[name]
        assert place["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"] == "k8s_node_selector"
        assert place["tolerations"][0]["tolerationJson"]["componentInputParameter"] == "k8s_tolerations"
        assert place["activeDeadlineSeconds"]
        assert place["emptyDirMounts"][0]["mountPath"] == "/dev/shm"
        assert tasks[name.replace("exec-", "comp-")]["retryPolicy"]["maxRetryCount"] == 2
    for place in executors.values():
        assert place["secretAsEnv"][0]["optional"]
        assert place["configMapAsEnv"][0]["optional"]
