"""Every pipeline for every cluster: it parses strictly, and holds to what this project asks of its tasks."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from google.protobuf import json_format

from pipelines.compile import PIPELINES
from pipelines.placement import ACCELERATED
from pipelines.profile import profile_names, read_profile
from shellv_core.stages.presets import PRESETS
from tests.pipelines.compiling import Task, documents, tasks_of, text_of

# Kubeflow Pipelines refuses specifications above 256 KB in some installations.
MAX_BYTES = 200_000
UNSUPPORTED_LOCALLY = ("pipeline_job_resource_name", "pipeline_job_create_time", "pipeline_job_schedule_time")
COMBINATIONS = [(pipeline, profile) for pipeline in PIPELINES for profile in profile_names()]
PROMISED = {
    "shellv": {
        *("preflight", "check-training", "prepare-data", "pretrain-projector", "finetune", "finetune-2"),
        *("merge-lora", "merge-lora-2", "evaluate", "promote", "deploy", "report-run"),
    },
    "shellv-align": {"preflight", "check-training", "prepare-data", "pretrain-projector", "report-run"},
    "shellv-evaluate": {"preflight", "evaluate", "promote", "report-run"},
    "shellv-data": {"preflight", "plan-data", "write-data", "prepare-data", "report-run"},
}
every_combination = pytest.mark.parametrize(("pipeline", "profile"), COMBINATIONS)


def tasks(pipeline: str, profile: str) -> list[Task]:
    return list(tasks_of(*documents(pipeline, profile)))


def parse_strictly(spec: dict[str, Any], platform: dict[str, Any]) -> None:
    from kfp.kubernetes.kubernetes_executor_config_pb2 import KubernetesExecutorConfig
    from kfp.pipeline_spec.pipeline_spec_pb2 import PipelineSpec, PlatformSpec

    json_format.ParseDict(spec, PipelineSpec())
    json_format.ParseDict(platform, PlatformSpec())
    for executor in platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"].values():
        json_format.ParseDict(executor, KubernetesExecutorConfig())


@every_combination
def test_both_documents_parse_with_unknown_fields_refused(pipeline: str, profile: str) -> None:
    parse_strictly(*documents(pipeline, profile))


def test_an_unknown_field_is_refused() -> None:
    spec, platform = (json.loads(json.dumps(each)) for each in documents("shellv"))
    executors = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    next(iter(executors.values()))["shmSize"] = "1Gi"
    with pytest.raises(json_format.ParseError, match="shmSize"):
        parse_strictly(spec, platform)


@every_combination
def test_the_file_is_small_and_runs_anywhere(pipeline: str, profile: str) -> None:
    text = text_of(pipeline, profile)
    assert len(text.encode()) < MAX_BYTES
    for placeholder in UNSUPPORTED_LOCALLY:
        assert placeholder not in text


@every_combination
def test_nothing_is_installed_at_run_time(pipeline: str, profile: str) -> None:
    for task in tasks(pipeline, profile):
        command = " ".join([*task.container["command"], *task.container["args"]])
        assert "pip" not in command.replace("pipeline", "")


@every_combination
def test_accelerated_tasks_have_all_that_a_gpu_node_asks_for(pipeline: str, profile: str) -> None:
    for task in tasks(pipeline, profile):
        resources = task.container["resources"]
        if task.facts.kind not in ACCELERATED:
            assert "accelerator" not in resources
            continue
        assert f"k8s_{task.facts.kind}_accelerators" in resources["accelerator"]["resourceCount"]
        assert "k8s_accelerator" in resources["accelerator"]["resourceType"]
        place = task.place
        assert place["nodeSelector"]["nodeSelectorJson"]["componentInputParameter"].endswith("k8s_node_selector")
        assert place["tolerations"][0]["tolerationJson"]["componentInputParameter"].endswith("k8s_tolerations")
        assert place["nodeAffinity"][0]["nodeAffinityJson"]["componentInputParameter"].endswith("k8s_node_affinity")
        assert {"mountPath": "/dev/shm", "medium": "Memory"}.items() <= place["emptyDirMounts"][1].items()
        queue = read_profile(profile).queue
        labels = place.get("podMetadata", {}).get("labels", {})
        assert labels == ({"kueue.x-k8s.io/queue-name": queue} if queue else {})


@every_combination
def test_every_task_is_bounded_connected_and_harmless(pipeline: str, profile: str) -> None:
    for task in tasks(pipeline, profile):
        settings = read_profile(profile).tasks.of(task.facts.kind)
        assert task.place["activeDeadlineSeconds"] == str(round(settings.timeout_hours * 3600))
        retries = task.spec.get("retryPolicy", {}).get("maxRetryCount", 0)
        assert retries == settings.retries == (0 if task.facts.kind == "check" else 3)
        if retries:
            assert task.spec["retryPolicy"]["backoffFactor"] > 1
        resources = task.container["resources"]
        assert resources["resourceMemoryRequest"] == resources["resourceMemoryLimit"] == settings.memory
        assert task.place["emptyDirMounts"][0]["mountPath"] == "/tmp"
        assert task.place["emptyDirMounts"][0]["sizeLimit"] == settings.scratch
        assert task.place["securityContext"] == {
            "runAsUser": "10001",
            "runAsGroup": "10001",
            "runAsNonRoot": True,
        }
        assert task.place["secretAsEnv"][0]["optional"]
        assert task.place["configMapAsEnv"][0]["optional"]
        assert [each["name"] for each in task.place["fieldPathAsEnv"]] == ["KFP_RUN_ID"]
        assert task.spec["taskInfo"]["name"]


@every_combination
def test_every_parameter_that_placement_names_reaches_its_task(pipeline: str, profile: str) -> None:
    """A task in a group sees the group's inputs alone, and kfp passes on only those that it was told of."""
    for task in tasks(pipeline, profile):
        named = set(re.findall(r'"componentInputParameter": "([^"]+)"', json.dumps(task.place)))
        assert named <= set(task.graph), task.name
        given = task.spec["inputs"]["parameters"]
        in_resources = set(re.findall(r"inputs\.parameters\['([^']+)'\]", json.dumps(task.container["resources"])))
        assert in_resources <= set(given), task.name
        for each in given.values():
            if "componentInputParameter" in each:
                assert each["componentInputParameter"] in task.graph, task.name


@every_combination
def test_what_looks_outside_its_inputs_is_never_cached(pipeline: str, profile: str) -> None:
    found = {task.facts.name: bool(task.spec["cachingOptions"].get("enableCache")) for task in tasks(pipeline, profile)}
    assert found == {name: name in CACHED for name in found}


CACHED = {"check_training", "pretrain_projector", "finetune", "merge_lora", "evaluate"}


@every_combination
def test_checks_come_first_and_a_report_last(pipeline: str, profile: str) -> None:
    spec, platform = documents(pipeline, profile)
    assert {task.name for task in tasks_of(spec, platform)} == PROMISED[pipeline]
    first = {
        name
        for name, task in spec["components"]["comp-exit-handler-1"]["dag"]["tasks"].items()
        if not task.get("dependentTasks")
    }
    assert first == PROMISED[pipeline] & {"preflight", "check-training"}
    report = spec["root"]["dag"]["tasks"]["report-run"]
    assert report["triggerPolicy"]["strategy"] == "ALL_UPSTREAM_TASKS_COMPLETED"
    assert report["dependentTasks"] == ["exit-handler-1"]


@pytest.mark.parametrize("pipeline", ["shellv", "shellv-evaluate"])
def test_an_evaluation_with_a_judge_is_kept_apart_in_the_cache(pipeline: str) -> None:
    (evaluate,) = (task for task in tasks(pipeline, "cpu") if task.name == "evaluate")
    assert evaluate.spec["inputs"]["parameters"]["cache_salt"]["taskOutputParameter"] == {
        "outputParameterKey": "cache_salt",
        "producerTask": "preflight",
    }


@every_combination
def test_a_stage_s_task_knows_no_overrides_but_its_own(pipeline: str, profile: str) -> None:
    """Else any override would make all stages miss the cache."""
    for task in tasks(pipeline, profile):
        if task.facts.kind == "check":
            continue
        stage = "prepare_data" if task.facts.kind == "data" else task.facts.name
        given = task.spec["inputs"]["parameters"]["overrides"]
        if pipeline == "shellv-data":
            assert not task.facts.cached
        else:
            assert given["taskOutputParameter"] == {"outputParameterKey": stage, "producerTask": "preflight"}


@every_combination
def test_parameters_are_described_grouped_by_prefix_and_have_the_cluster_s_defaults(
    pipeline: str, profile: str
) -> None:
    parameters = documents(pipeline, profile)[0]["root"]["inputDefinitions"]["parameters"]
    known = read_profile(profile)
    assert parameters["preset"]["literals"] == list(PRESETS)
    assert parameters["preset"]["defaultValue"] == known.preset
    for name, parameter in parameters.items():
        assert parameter["description"], name
        given = name == "root_uri" or (pipeline == "shellv-evaluate" and name in ("data_uri", "model_uri"))
        assert parameter.get("isOptional", False) != given, name
        if "literals" in parameter:
            assert parameter["defaultValue"] in parameter["literals"]
    if "k8s_training_accelerators" in parameters:
        assert parameters["k8s_training_accelerators"]["defaultValue"] == str(known.tasks.training.accelerators)
        assert parameters["k8s_accelerator_gb"]["defaultValue"] == known.accelerator_gb
    own = {"root_uri", "preset", "overrides", "registered_model", "data_uri", "model_uri", "baseline_uri"}
    assert all(name in own or name.startswith(("data_", "train_", "deploy_", "k8s_")) for name in parameters)


def test_the_baseline_is_trained_without_hacl() -> None:
    overrides = [
        task.spec["inputs"]["parameters"]["task_overrides"]["runtimeValue"]["constant"]
        for task in tasks("shellv", "cpu")
        if task.facts.name == "finetune"
    ]
    assert overrides == [[], ["finetune.hacl.weight=0"]]
