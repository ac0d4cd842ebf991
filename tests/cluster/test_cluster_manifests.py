"""The code of shellv_core.cluster and the manifests of k8s/ name the same things."""

from __future__ import annotations

import asyncio
import copy

import pytest

from shellv_core.cluster import rollout, train_job
from shellv_core.cluster.launcher import delete_jobs
from shellv_core.cluster.permissions import PERMISSIONS
from shellv_core.endpoint.client import user_message
from shellv_core.errors import ServingError, TrainingError
from shellv_core.stages.launch import LaunchConfig, train_job_of
from shellv_core.stages.presets import stage_config
from shellv_core.storage import OutputDirectory
from tests.cluster import test_rollout
from tests.cluster.test_launcher import NAME, Running, condition, created, manifest, pod, until
from tests.cluster.test_rollout import CANARY, STABLE, deploying
from tests.k8s.rendering import named, render
from tests.k8s.validation import InvalidError, validate

models, controller = test_rollout.models, test_rollout.controller
LAUNCH = LaunchConfig(
    nodes=4,
    image="registry.example/shellv-train:1",
    run_id="3f2a9c1e-77aa-4b0c-9d0e-1c2d3e4f5a6b",
    num_accelerators=8,
    cpu="32",
    memory="400Gi",
    node_selector={"nvidia.com/gpu.product": "NVIDIA-A100-SXM4-80GB"},
    # As Kubeflow Pipelines hands numbers over.
    tolerations=[{"key": "nvidia.com/gpu", "operator": "Exists", "effect": "NoExecute", "tolerationSeconds": 300.0}],
    node_affinity={
        "requiredDuringSchedulingIgnoredDuringExecution": {
            "nodeSelectorTerms": [{"matchExpressions": [{"key": "zone", "operator": "In", "values": ["a"]}]}]
        }
    },
    queue="shellv",
)


@pytest.mark.parametrize("launch", [LAUNCH, LaunchConfig(nodes=2, image="a/b:1", run_id="7")])
@pytest.mark.parametrize("stage", ["pretrain_projector", "finetune"])
def test_the_api_takes_the_train_job(tmp_path, launch, stage):
    config = stage_config("shellv-7b", stage, data_uri="s3://shellv/data", output_uri="s3://shellv/{fingerprint}")
    job = train_job_of(stage, config, launch, OutputDirectory(tmp_path.as_uri(), "ab" * 32))
    validate(job)
    trainer = job["spec"]["trainer"]
    assert trainer["numProcPerNode"] == (launch.num_accelerators or 1)
    with pytest.raises(InvalidError):
        validate({**job, "spec": {**job["spec"], "podTemplateOverrides": []}})


def test_numbers_are_whole_again_and_resources_complete(tmp_path):
    config = stage_config("nano", "finetune", data_uri="s3://shellv/data", output_uri="s3://shellv/{fingerprint}")
    spec = train_job_of("finetune", config, LAUNCH, OutputDirectory(tmp_path.as_uri(), "ab" * 32))["spec"]
    (patch,) = spec["runtimePatches"]
    (replicated,) = patch["trainingRuntimeSpec"]["template"]["spec"]["replicatedJobs"]
    pods = replicated["template"]["spec"]["template"]
    assert pods["spec"]["tolerations"][0]["tolerationSeconds"] == 300
    assert isinstance(pods["spec"]["tolerations"][0]["tolerationSeconds"], int)
    assert pods["metadata"]["labels"]["shellv.dev/run"] == LAUNCH.run_id
    amounts = {"cpu": "32", "memory": "400Gi", "nvidia.com/gpu": "8"}
    assert spec["trainer"]["resourcesPerNode"] == {"requests": amounts, "limits": amounts}


def test_the_runtime_is_what_the_job_counts_on():
    runtime = named(render("k8s/cluster/training"), "ClusterTrainingRuntime", LaunchConfig().runtime)
    (replicated,) = runtime["spec"]["template"]["spec"]["replicatedJobs"]
    assert replicated["name"] == train_job.NODE
    pods = replicated["template"]["spec"]["template"]["spec"]
    assert [each["name"] for each in pods["containers"]] == [train_job.NODE]
    assert pods["terminationGracePeriodSeconds"] > train_job.SHUTDOWN_SECONDS


@pytest.mark.parametrize("overlay", ["cpu", "a100-80"])
def test_the_deployments_of_an_overlay_are_rolled_out(api, controller, overlay):
    objects = render(f"k8s/overlays/{overlay}")
    for name in (STABLE, CANARY):
        api.put("deployments", named(objects, "Deployment", name))
        assert named(objects, "Service", name)["spec"]["ports"][0]["port"] == 8000
    assert api.objects["deployments", CANARY]["spec"]["replicas"] == 0
    before = copy.deepcopy(api.objects["deployments", STABLE]["spec"])
    with deploying(2) as deployed:
        assert asyncio.run(deployed.client.answer([user_message("Who?")])) == "I am 2"
    stable = api.objects["deployments", STABLE]
    assert rollout.model_of(stable) == "models:/shellv/2"
    validate({key: value for key, value in stable.items() if key != "status"} | {"metadata": {"name": STABLE}})
    after = copy.deepcopy(stable["spec"])
    after["template"]["metadata"]["labels"].pop(rollout.VERSION_LABEL)
    (container,) = after["template"]["spec"]["containers"]
    assert container["env"].pop() == {"name": rollout.MODEL_VARIABLE, "value": "models:/shellv/2"}
    assert after == before, "only the model is deploy's"


def test_the_code_needs_all_the_permissions_and_no_others(api, controller, cluster):
    """Through a job that fails and rollouts that fail and succeed, which together do all that there is to do."""
    with deploying(2):
        pass
    for behaviour in ("crash", "slow"):
        controller.behaviours["models:/shellv/3"] = behaviour
        with pytest.raises(ServingError), deploying(3, startup_timeout_seconds=0.3):
            pass
    running = Running(cluster, manifest())
    created(api)
    api.put("pods", pod())
    api.log(f"{NAME}-node-0-0-x", "node").closed = True
    until(lambda: api.asked["", "pods/log", "get"] > 1)
    api.set_status("trainjobs", NAME, **condition("Failed"))
    with pytest.raises(TrainingError):
        running.end()
    delete_jobs("7")
    asked = {key for key in api.asked if key[1] != "services/proxy"}
    assert asked == {(each.group, each.resource, verb) for each in PERMISSIONS for verb in each.verbs}
