"""A new version of the served model, tried on the canary Deployment and then given to the stable one.

The Deployments are the platform's (``k8s/``): resources, probes, strategy and the number of stable replicas. What is
written here, by server-side apply, are the model that they serve, labels that tell it, and the canary's replicas.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from shellv_core.cluster.connection import DEPLOYMENTS, PODS, Cluster
from shellv_core.cluster.following import follow
from shellv_core.cluster.pods import Fault, explain, faults
from shellv_core.cluster.termination import sigterm_raises
from shellv_core.errors import ClusterError, ServingError
from shellv_core.logs import get_logger

logger = get_logger(__name__)

MANAGER = "shellv-deploy"
CONTAINER, MODEL_VARIABLE = "serve", "SHELLV_MODEL"
VERSION_LABEL, PREVIOUS_ANNOTATION = "shellv.dev/version", "shellv.dev/previous-model"
CANARY_SUFFIX = "-canary"
INTERVAL_SECONDS, LOG_INTERVAL_SECONDS = 5.0, 10.0
#: How long a pod may be seen with a lasting fault, which a registry's short outage looks like too.
FAULT_GRACE_SECONDS = 60.0


@dataclass(frozen=True)
class Version:
    """What a Deployment is to serve: a reference that always names the same files, and the version for its label."""

    model: str
    label: str


@contextlib.contextmanager
def rolled_out(
    cluster: Cluster, name: str, version: Version, timeout_seconds: float, check: Callable[[str], None]
) -> Iterator[str]:
    """Serve `version` from the canary while the context is open, and from the stable Deployment `name` after it.

    SIGTERM, an error inside the context or one of the stable rollout leaves the stable Deployment at the version that
    it had, and the canary at no replicas. Entered again after a kill it goes on; where the version is stable already,
    nothing is rolled out.

    Args:
        timeout_seconds: the longest time for each of the two rollouts.
        check: raises a `ServingError` unless the Service of this name serves the version.

    Yields:
        The name of the Service to ask.

    Raises:
        ClusterError: if a Deployment is missing, or the API refuses or does not answer.
        ServingError: if a rollout fails, with what its pods say.
        Preempted: on SIGTERM.
    """
    canary = f"{name}{CANARY_SUFFIX}"
    stable_now, canary_now = _existing(cluster, name), _existing(cluster, canary)
    before = model_of(stable_now)
    if before == version.model and not canary_now["spec"].get("replicas", 1) and _is_done(stable_now):
        logger.info("deploy: %s serves %s already", name, version.model)
        check(name)
        yield name
        return
    if before == version.model:
        # An earlier try was killed in the middle of the switch.
        before = stable_now["metadata"].get("annotations", {}).get(PREVIOUS_ANNOTATION)
    try:
        with sigterm_raises(f"stopped, {canary} removed; run again to roll {version.model} out."):
            cluster.apply(DEPLOYMENTS, _manifest(canary, version, replicas=1), MANAGER)
            await_rollout(cluster, canary, version, timeout_seconds)
            check(canary)
            yield canary
            _switch(cluster, name, version, before, timeout_seconds, check)
    finally:
        # The error that led here is the one to report.
        with contextlib.suppress(ClusterError):
            cluster.apply(DEPLOYMENTS, _manifest(canary, version, replicas=0), MANAGER)


def _switch(
    cluster: Cluster,
    name: str,
    version: Version,
    before: str | None,
    timeout_seconds: float,
    check: Callable[[str], None],
) -> None:
    """Give the stable Deployment `version`, and back what it had `before` (None: what the platform set) on failure."""
    logger.info("deploy: the canary is good; %s goes from %s to %s", name, before or "its default", version.model)
    try:
        cluster.apply(DEPLOYMENTS, _manifest(name, version, previous=before), MANAGER)
        await_rollout(cluster, name, version, timeout_seconds)
        check(name)
    except BaseException as error:
        earlier = Version(before, before.rpartition("/")[2]) if before else None
        cluster.apply(DEPLOYMENTS, _manifest(name, earlier), MANAGER)
        logger.warning("deploy: %s goes back to %s", name, before or "its default")
        if isinstance(error, ServingError):
            await_rollout(cluster, name, earlier, timeout_seconds)
            raise ServingError(f"{error}\n{name} is back at {before or 'its default'}.") from None
        raise


def await_rollout(cluster: Cluster, name: str, version: Version | None, timeout_seconds: float) -> None:
    """Wait until all of a Deployment's pods are of its newest template and available.

    Args:
        version: what those pods serve; None for the platform's default.

    Raises:
        ServingError: if they do not become so in time, or cannot.
    """
    started = time.monotonic()
    seen: dict[tuple[str, str], float] = {}
    shown = 0.0
    for deployment in follow(cluster, DEPLOYMENTS, name, min(INTERVAL_SECONDS, timeout_seconds)):
        if deployment is None:
            raise ServingError(f"the Deployment {name} was deleted during its rollout.")
        if _is_done(deployment):
            logger.info("deploy: %s is rolled out, %.0f s", name, time.monotonic() - started)
            return
        found = _new_faults(cluster, deployment, version)
        now = time.monotonic()
        stuck = [
            fault
            for fault in found
            if fault.lasting and now - seen.setdefault((fault.pod, fault.container), now) >= FAULT_GRACE_SECONDS
        ]
        elapsed = now - started
        reason = "its pods cannot start" if stuck else _deadline(deployment)
        if not reason and elapsed >= timeout_seconds:
            reason = f"not done within {timeout_seconds:g} seconds"
        if reason:
            raise ServingError(
                f"the rollout of {version.model if version else 'the default'} on {name} failed: {reason}"
                f" ({_progress(deployment, elapsed)}).\n{explain(cluster, found)}".rstrip()
            )
        if now - shown >= LOG_INTERVAL_SECONDS:
            shown = now
            logger.info(
                "deploy: %s: %s, at most %.0f s more%s",
                name,
                _progress(deployment, elapsed),
                timeout_seconds - elapsed,
                "".join(f"; {fault}" for fault in found),
            )


def model_of(deployment: Mapping[str, Any]) -> str | None:
    """The model that a Deployment's template names itself; None where it leaves that to the platform's settings."""
    containers = deployment["spec"]["template"]["spec"]["containers"]
    variables = [each for container in containers for each in container.get("env", [])]
    return next((each.get("value") for each in variables if each["name"] == MODEL_VARIABLE), None)


def _existing(cluster: Cluster, name: str) -> dict[str, Any]:
    found = cluster.get(DEPLOYMENTS, name)
    if found is None:
        raise ClusterError(
            f"there is no Deployment {name} in namespace {cluster.namespace}; apply one of k8s/overlays first:"
            " kubectl apply -k k8s/overlays/NAME."
        )
    return found


def _manifest(
    name: str, version: Version | None, replicas: int | None = None, previous: str | None = None
) -> dict[str, Any]:
    """What the manager owns of a Deployment; what it owned before and is not in here is given back."""
    manifest: dict[str, Any] = {"apiVersion": "apps/v1", "kind": "Deployment", "metadata": {"name": name}}
    spec: dict[str, Any] = {}
    if previous:
        manifest["metadata"]["annotations"] = {PREVIOUS_ANNOTATION: previous}
    if replicas is not None:
        spec["replicas"] = replicas
    if version is not None:
        variable = {"name": MODEL_VARIABLE, "value": version.model}
        spec["template"] = {
            "metadata": {"labels": {VERSION_LABEL: version.label}},
            "spec": {"containers": [{"name": CONTAINER, "env": [variable]}]},
        }
    return {**manifest, "spec": spec} if spec else manifest


def _is_done(deployment: Mapping[str, Any]) -> bool:
    status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    return (
        status.get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
        and status.get("updatedReplicas", 0) >= wanted
        and status.get("replicas", 0) <= status.get("updatedReplicas", 0)
        and status.get("availableReplicas", 0) >= wanted
    )


def _progress(deployment: Mapping[str, Any], elapsed: float) -> str:
    status, wanted = deployment.get("status", {}), deployment["spec"].get("replicas", 1)
    updated = status.get("updatedReplicas", 0)
    old = max(status.get("replicas", 0) - updated, 0)
    # Of all available pods the old ones were so before.
    ready = max(min(updated, status.get("availableReplicas", 0) - old), 0)
    eta = f", ETA {elapsed / ready * (wanted - ready):.0f} s" if 0 < ready < wanted else ""
    return f"{ready}/{wanted} new pods available, {old} old ones left, {elapsed:.0f} s{eta}"


def _deadline(deployment: Mapping[str, Any]) -> str:
    for condition in deployment.get("status", {}).get("conditions", []):
        seen = deployment["status"].get("observedGeneration", 0) >= deployment["metadata"].get("generation", 0)
        if seen and condition["type"] == "Progressing" and condition.get("reason") == "ProgressDeadlineExceeded":
            return str(condition.get("message") or "ProgressDeadlineExceeded")
    return ""


def _new_faults(cluster: Cluster, deployment: Mapping[str, Any], version: Version | None) -> list[Fault]:
    labels = dict(deployment["spec"]["selector"]["matchLabels"])
    if version is not None:
        labels[VERSION_LABEL] = version.label
    return faults(cluster.list(PODS, labels=",".join(f"{key}={value}" for key, value in labels.items())))
