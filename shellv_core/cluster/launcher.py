"""Runs a TrainJob to its end: created once, found again by a retry, followed, and deleted when it is over."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from http import HTTPStatus
from typing import Any

from shellv_core.cluster.connection import PODS, ApiError, Cluster
from shellv_core.cluster.following import follow
from shellv_core.cluster.logs import FollowedLog
from shellv_core.cluster.pods import explain, faults
from shellv_core.cluster.termination import sigterm_raises
from shellv_core.cluster.train_job import DIGEST_ANNOTATION, NODE, RUN_LABEL, TRAIN_JOBS, pod_labels, run_label
from shellv_core.errors import ClusterError, TrainingError
from shellv_core.logs import get_logger, last_words

logger = get_logger(__name__)

INTERVAL_SECONDS = 30.0


def run_job(cluster: Cluster, manifest: Mapping[str, Any]) -> None:
    """Run the job of `manifest` to its end, its log passed on to standard error; it is deleted afterwards.

    A job of the same name and specification, which an earlier try has left running, is taken over. While a queue
    keeps the job suspended it is waited for.

    Raises:
        TrainingError: if the job fails, with its reason and the log's end, or someone deletes it.
        Preempted: on SIGTERM; the job is deleted and the next try's goes on from the last checkpoint.
        ClusterError: if there is another job of this name, or the API does not answer for minutes; the job goes on,
            and the next try takes it over.
    """
    name = manifest["metadata"]["name"]
    with sigterm_raises(f"stopped, the TrainJob {name} deleted; run again to go on from its last checkpoint."):
        _create_or_take_over(cluster, manifest)
        try:
            with FollowedLog(cluster, pod_labels(name), NODE) as log:
                end = _wait(cluster, name)
        except ClusterError:
            raise
        except BaseException:
            with contextlib.suppress(ClusterError):
                cluster.delete(TRAIN_JOBS, name)
            raise
        reasons = "" if end["type"] == "Complete" else _reasons(cluster, name)
        cluster.delete(TRAIN_JOBS, name)
    if end["type"] != "Complete":
        why = ": ".join(filter(None, (end.get("reason"), end.get("message"))))
        raise TrainingError(f"the TrainJob {name} failed ({why}){reasons}\nIts log: {last_words(list(log.tail))}")
    logger.info("TrainJob %s: complete", name)


def delete_jobs(run_id: str, namespace: str = "") -> list[str]:
    """Delete all jobs of a pipeline run, finished or not; returns their names. For the end of a run, however it ends.

    Raises:
        ClusterError: if the API refuses or does not answer.
    """
    cluster = Cluster(namespace)
    jobs = cluster.list(TRAIN_JOBS, labels=f"{RUN_LABEL}={run_label(run_id)}")
    names = [str(job["metadata"]["name"]) for job in jobs]
    return [name for name in names if cluster.delete(TRAIN_JOBS, name)]


def _create_or_take_over(cluster: Cluster, manifest: Mapping[str, Any]) -> None:
    name = manifest["metadata"]["name"]
    while True:
        try:
            cluster.create(TRAIN_JOBS, manifest)
            logger.info("TrainJob %s: created in namespace %s", name, cluster.namespace)
            return
        except ApiError as error:
            if error.status == HTTPStatus.NOT_FOUND:
                raise ClusterError(f"{error} Is Kubeflow Trainer installed, and is there such a namespace?") from None
            if error.status != HTTPStatus.CONFLICT:
                raise
        found = cluster.get(TRAIN_JOBS, name)
        if found is None:
            continue
        if "deletionTimestamp" in found["metadata"]:
            logger.info("TrainJob %s: waiting for an earlier one to be gone", name)
            for state in follow(cluster, TRAIN_JOBS, name, INTERVAL_SECONDS):
                if state is None or "deletionTimestamp" not in state["metadata"]:
                    break
            continue
        digests = [each["metadata"].get("annotations", {}).get(DIGEST_ANNOTATION, "none") for each in (found, manifest)]
        if digests[0] != digests[1]:
            raise ClusterError(
                f"there is a TrainJob {name} in namespace {cluster.namespace} with another specification (digest"
                f" {digests[0][:12]}, this one has {digests[1][:12]}): a retry with another image or other settings, or"
                f" not ours. Delete it (kubectl delete trainjob {name}) or start a new run."
            )
        logger.info("TrainJob %s: taking over the one that an earlier try created", name)
        return


def _wait(cluster: Cluster, name: str) -> dict[str, Any]:
    """Follow the job; returns the condition that ended it."""
    shown = ""
    for job in follow(cluster, TRAIN_JOBS, name, INTERVAL_SECONDS):
        if job is None:
            raise TrainingError(
                f"the TrainJob {name} was deleted while it ran; run again to go on from the checkpoint."
            )
        conditions = {
            each["type"]: each for each in job.get("status", {}).get("conditions", []) if each["status"] == "True"
        }
        for end in ("Complete", "Failed"):
            if end in conditions:
                return dict(conditions[end])
        suspended = conditions.get("Suspended")
        state = f"queued: {suspended.get('message', '')}" if suspended else _describe(cluster, name, job)
        if state != shown:
            shown = state
            logger.info("TrainJob %s: %s", name, state)
    raise AssertionError("unreachable")


def _describe(cluster: Cluster, name: str, job: Mapping[str, Any]) -> str:
    status = job.get("status", {})
    counts: dict[str, Any] = next((each for each in status.get("jobsStatus") or [] if each.get("name") == NODE), {})
    trainer = status.get("trainerStatus") or {}
    if "progressPercentage" in trainer:
        eta = trainer.get("estimatedRemainingSeconds")
        return f"{trainer['progressPercentage']}%" + (f", ETA {eta} s" if eta is not None else "")
    if counts.get("ready"):
        return "running"
    waiting = faults(cluster.list(PODS, labels=f"jobset.sigs.k8s.io/jobset-name={name}"))
    return "starting" + "".join(f"; {fault}" for fault in waiting)


def _reasons(cluster: Cluster, name: str) -> str:
    """What the job's pods say, as far as there are any left; the failure itself is known already."""
    with contextlib.suppress(ClusterError):
        found = faults(cluster.list(PODS, labels=f"jobset.sigs.k8s.io/jobset-name={name}"))
        return "\n" + explain(cluster, found) if found else ""
    return ""
