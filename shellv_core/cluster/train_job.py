"""The TrainJob (Kubeflow Trainer v2) that runs a training stage on several machines, as a dictionary.

What every job has (credentials, volumes, security) is in the ClusterTrainingRuntime that it refers to; see ``k8s/``.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from shellv_core.cluster.connection import Resource
from shellv_core.config import fingerprint

TRAIN_JOBS = Resource("trainer.kubeflow.org", "v1alpha1", "trainjobs")
RUN_LABEL, QUEUE_LABEL = "shellv.dev/run", "kueue.x-k8s.io/queue-name"
DIGEST_ANNOTATION, OUTPUT_ANNOTATION = "shellv.dev/spec-sha256", "shellv.dev/output-uri"
#: Who owns the patches of the runtime, in the API's terms.
PATCH_MANAGER = "shellv.dev/launcher"
#: The runtime's replicated job, and the container in it.
NODE = "node"
#: A stop lets the processes write a checkpoint; within the runtime's terminationGracePeriodSeconds.
SHUTDOWN_SECONDS = 100
#: A pod's host name is the job's name and more, and may have 63 characters.
MAX_NAME, MAX_LABEL = 50, 63


def job_name(run_id: str, stage: str, identity: str) -> str:
    """The one name of a stage's job in a pipeline run, so that a retry finds the job that an earlier try created.

    Args:
        identity: the stage's fingerprint, by which two tasks of one stage differ.
    """
    tail = f"{_slug(stage)}-{identity[:8]}"
    room = MAX_NAME - len("sv--") - len(tail)
    return f"sv-{_slug(run_id)[:room].strip('-')}-{tail}"


def run_label(run_id: str) -> str:
    """`run_id` as a label's value."""
    return re.sub(r"[^A-Za-z0-9._-]", "-", run_id)[:MAX_LABEL].strip("-._")


def train_job(
    name: str,
    run_id: str,
    output_uri: str,
    command: Sequence[str],
    image: str,
    nodes: int,
    processes_per_node: int,
    resources: Mapping[str, str],
    runtime: str,
    deadline_seconds: int,
    queue: str = "",
    pods: Mapping[str, Any] | None = None,
    tracking: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """The job's manifest; an annotation holds the digest of its specification.

    Args:
        command: what each machine runs; Trainer tells torchrun its place among the others in PET_* variables.
        resources: of each machine, requested and at most; empty leaves the runtime's.
        pods: settings of the pods that differ from the runtime's: nodeSelector, tolerations, affinity.
        tracking: variables that name the tracked run. They are no part of the digest: a retry has others.
    """
    trainer: dict[str, Any] = {
        "image": image,
        "command": list(command),
        "env": [{"name": "TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "value": str(SHUTDOWN_SECONDS)}],
        "numNodes": nodes,
        "numProcPerNode": processes_per_node,
    }
    if resources:
        trainer["resourcesPerNode"] = {"requests": dict(resources), "limits": dict(resources)}
    labels = {RUN_LABEL: run_label(run_id), "app.kubernetes.io/part-of": "shellv"}
    spec = {
        "runtimeRef": {"apiGroup": TRAIN_JOBS.group, "kind": "ClusterTrainingRuntime", "name": runtime},
        "activeDeadlineSeconds": deadline_seconds,
        "trainer": trainer,
        "runtimePatches": runtime_patches(labels, pods or {}),
    }
    digest = fingerprint(spec)
    trainer["env"] += [{"name": key, "value": value} for key, value in (tracking or {}).items()]
    return {
        "apiVersion": f"{TRAIN_JOBS.group}/{TRAIN_JOBS.version}",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": labels | ({QUEUE_LABEL: queue} if queue else {}),
            "annotations": {DIGEST_ANNOTATION: digest, OUTPUT_ANNOTATION: output_uri},
        },
        "spec": spec,
    }


def runtime_patches(labels: Mapping[str, str], pods: Mapping[str, Any]) -> list[dict[str, Any]]:
    """How a job changes its runtime, in the shape of Trainer 2.2 and later (podTemplateOverrides before that)."""
    template: dict[str, Any] = {"metadata": {"labels": dict(labels)}}
    if pods:
        template["spec"] = _whole_numbers(pods)
    replicated = {"name": NODE, "template": {"spec": {"template": template}}}
    patch = {"template": {"spec": {"replicatedJobs": [replicated]}}}
    return [{"manager": PATCH_MANAGER, "trainingRuntimeSpec": patch}]


def pod_labels(name: str) -> str:
    """A selector of the pods of the job's first machine, the one that tracks and writes the output."""
    return ",".join(
        [
            f"jobset.sigs.k8s.io/jobset-name={name}",
            f"jobset.sigs.k8s.io/replicatedjob-name={NODE}",
            "batch.kubernetes.io/job-completion-index=0",
        ]
    )


def _whole_numbers(value: Any) -> Any:
    """Kubeflow Pipelines gives numbers in lists and maps as floats; the API takes none for a whole number."""
    if isinstance(value, Mapping):
        return {key: _whole_numbers(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [_whole_numbers(each) for each in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
