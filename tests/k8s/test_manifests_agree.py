"""Names and sizes that stand in k8s/ and elsewhere: in the profiles of pipelines, in the launcher, in the server."""

from __future__ import annotations

import pytest

from pipelines.profile import gigabytes, profile_names, read_profile
from shellv_core.cluster import train_job
from shellv_core.stages.launch import LaunchConfig
from shellv_core.stages.presets import preset
from tests.k8s.rendering import OVERLAYS, named, of_kind, pods, render
from tests.k8s.validation import InvalidError, validate

PROFILES = profile_names()


@pytest.mark.parametrize("name", PROFILES)
def test_a_profile_and_its_overlay_name_the_same_things(name: str) -> None:
    profile = read_profile(name)
    assert f"k8s/overlays/{name}" in OVERLAYS
    objects = render(f"k8s/overlays/{name}")
    assert named(objects, "ServiceAccount", profile.service_account)
    assert named(objects, "ConfigMap", profile.config_map)
    server = named(objects, "Deployment", "shellv-serve")["spec"]["template"]["spec"]
    assert profile.secret in [each.get("secretRef", {}).get("name") for each in server["containers"][0]["envFrom"]]
    assert server["securityContext"]["runAsUser"] == profile.user
    if profile.accelerator_gb:
        assert server["nodeSelector"] == profile.node_selector
        assert server["tolerations"] == profile.toleration_values()
        assert profile.accelerator in server["containers"][0]["resources"]["limits"]
    assert server.get("affinity", {}).get("nodeAffinity", {}) == profile.node_affinity
    assert [each["metadata"]["name"] for each in of_kind(objects, "LocalQueue")] == [profile.queue][
        : bool(profile.queue)
    ]
    model = preset(profile.preset).deploy.registered_model
    assert named(objects, "ConfigMap", "shellv-serve")["data"]["SHELLV_MODEL"] == f"models:/{model}@champion"


@pytest.mark.parametrize("name", PROFILES)
def test_the_training_runtime_has_the_room_that_tasks_have(name: str) -> None:
    training = read_profile(name).tasks.training
    [(_, _, spec)] = pods(render("k8s/cluster/training"))
    limits = {each["name"]: each["emptyDir"]["sizeLimit"] for each in spec["volumes"]}
    assert gigabytes(limits["shm"]) >= gigabytes(training.shared_memory or "0Gi")
    assert gigabytes(limits["tmp"]) >= gigabytes(training.scratch)


def test_the_launcher_finds_its_runtime() -> None:
    [runtime] = render("k8s/cluster/training")
    assert runtime["metadata"]["name"] == LaunchConfig().runtime
    [job] = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert job["name"] == train_job.NODE
    spec = job["template"]["spec"]["template"]["spec"]
    assert [each["name"] for each in spec["containers"]] == [train_job.NODE]
    assert spec["terminationGracePeriodSeconds"] > train_job.SHUTDOWN_SECONDS


def test_the_launchers_job_is_one_that_trainer_takes() -> None:
    profile = read_profile("a100-80")
    job = train_job.train_job(
        name=train_job.job_name("run-1", "finetune", "0123456789abcdef"),
        run_id="run-1",
        output_uri="s3://shellv/runs/1",
        command=["torchrun", "-m", "shellv_core.cli"],
        image="localhost/shellv-train:0.1.0",
        nodes=2,
        processes_per_node=8,
        resources={"cpu": "64", "memory": "800Gi", "nvidia.com/gpu": "8"},
        runtime="shellv-torch",
        deadline_seconds=3600,
        queue=profile.queue,
        pods={"nodeSelector": profile.node_selector, "tolerations": profile.toleration_values()},
        tracking={"MLFLOW_RUN_ID": "1"},
    )
    validate(job)
    # A field of the shape before Trainer 2.2.
    job["spec"]["podTemplateOverrides"] = []
    with pytest.raises(InvalidError, match="podTemplateOverrides"):
        validate(job)
