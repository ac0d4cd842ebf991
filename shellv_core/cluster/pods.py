"""What pods say of why they do not run: states of their containers, events, and last lines of their logs."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shellv_core.cluster.connection import EVENTS, PODS, TIMEOUT_SECONDS, ApiError, Cluster, refusal
from shellv_core.errors import ClusterError

#: Reasons for waiting that time alone does not mend; a node that comes (Unschedulable) or a start that lasts may.
LASTING = frozenset(
    {
        "ImagePullBackOff",
        "InvalidImageName",
        "ErrImageNeverPull",
        "CrashLoopBackOff",
        "CreateContainerConfigError",
        "CreateContainerError",
        "RunContainerError",
    }
)
TAIL_LINES, NUM_EVENTS = 15, 3
#: A log may be silent for long; a connection that is dead is found after this time.
LOG_SILENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Fault:
    """Why a pod does not run; `container` is empty where the whole pod waits."""

    pod: str
    container: str
    reason: str
    message: str

    @property
    def lasting(self) -> bool:
        """Whether waiting longer is unlikely to help."""
        return self.reason in LASTING

    def __str__(self) -> str:
        where = f"pod {self.pod}" + (f", container {self.container}" if self.container else "")
        return f"{where}: {self.reason}" + (f" ({self.message})" if self.message else "")


def faults(pods: Sequence[Mapping[str, Any]]) -> list[Fault]:
    """What is wrong with these pods now; nothing of those that are only starting."""
    found = []
    for pod in pods:
        name, status = pod["metadata"]["name"], pod.get("status", {})
        for condition in status.get("conditions", []):
            if condition["type"] == "PodScheduled" and condition["status"] == "False":
                found.append(Fault(name, "", condition.get("reason", "Unschedulable"), condition.get("message", "")))
        if status.get("phase") == "Failed":
            found.append(Fault(name, "", status.get("reason", "Failed"), status.get("message", "")))
        for container in [*status.get("initContainerStatuses", []), *status.get("containerStatuses", [])]:
            found += _container_faults(name, container)
    return found


def _container_faults(pod: str, status: Mapping[str, Any]) -> list[Fault]:
    waiting = status.get("state", {}).get("waiting", {})
    reason = waiting.get("reason", "")
    last = status.get("lastState", {}).get("terminated") or status.get("state", {}).get("terminated") or {}
    ended = f"ended with code {last.get('exitCode')}, {last.get('reason', '')}".rstrip(", ") if last else ""
    if reason in LASTING or reason.startswith("Err"):
        return [Fault(pod, status["name"], reason, ", ".join(filter(None, [waiting.get("message", ""), ended])))]
    if last.get("reason") == "OOMKilled":
        return [Fault(pod, status["name"], "OOMKilled", "it needs more memory than its limit")]
    return []


def explain(cluster: Cluster, found: Sequence[Fault]) -> str:
    """`found` with each pod's warnings and, where a container ran, the last lines of its log; for an error's end."""
    parts = []
    for fault in found:
        parts.append(str(fault))
        with contextlib.suppress(ClusterError):
            parts += [f"  event: {each}" for each in _warnings(cluster, fault.pod)]
            if fault.container and fault.reason in ("CrashLoopBackOff", "OOMKilled"):
                parts += [f"  log: {line}" for line in read_log(cluster, fault.pod, fault.container, previous=True)]
    return "\n".join(parts)


def _warnings(cluster: Cluster, pod: str) -> list[str]:
    events = cluster.list(EVENTS, fields=f"involvedObject.name={pod},type=Warning")
    return [f"{each.get('reason', '')}: {each.get('message', '')}" for each in events[-NUM_EVENTS:]]


def read_log(cluster: Cluster, pod: str, container: str, previous: bool = False) -> list[str]:
    """The last lines of a container's log, of its previous run if asked; none where it has not run.

    Raises:
        ApiError: if the account may not read logs.
    """
    query = {"container": container, "tailLines": str(TAIL_LINES), "previous": "true" if previous else ""}
    try:
        response = open_log(cluster, pod, query)
    except ApiError as error:
        if error.status in (400, 404):
            return []
        raise
    with contextlib.closing(response):
        return [str(line) for line in response.data.decode("utf-8", "replace").splitlines()]


def open_log(cluster: Cluster, pod: str, query: Mapping[str, str]) -> Any:
    """The log of a pod as a response that is read as it comes.

    Raises:
        ApiError: if the API refuses.
        OSError, urllib3.exceptions.HTTPError: if it does not answer.
    """
    from kubernetes.client import ApiException

    path = f"{PODS.path(cluster.namespace, pod)}/log"
    try:
        return cluster.api.call_api(
            path,
            "GET",
            query_params=[(key, value) for key, value in query.items() if value],
            header_params={"Accept": "*/*"},
            auth_settings=["BearerToken"],
            _return_http_data_only=True,
            _preload_content=False,
            _request_timeout=(TIMEOUT_SECONDS[0], LOG_SILENCE_SECONDS),
        )
    except ApiException as error:
        raise refusal(cluster, "GET", path, error) from None
