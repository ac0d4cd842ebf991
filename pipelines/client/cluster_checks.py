"""The checks of ``doctor`` that ask the Kubernetes API: GPU nodes, and what the tasks' namespace must hold."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from pipelines.client.checks import Check, Failed, NotChecked, checked

ACCELERATOR = "nvidia.com/gpu"
PRODUCT_LABELS = ("nvidia.com/gpu.product", "cloud.google.com/gke-accelerator")
SECRET, CONFIG_MAP, SERVICE_ACCOUNT = "shellv-storage", "shellv-services", "pipeline-runner"
TIMEOUT_SECONDS = 10


def cluster_checks(namespace: str) -> list[Check]:
    """The checks of the cluster that kubeconfig, or the pod's service account, leads to."""
    try:
        core = _core()
    except NotChecked as error:
        return [Check("GPU nodes", "not checked", str(error), error.remedy)]
    named = {
        "secret": (core.read_namespaced_secret, SECRET),
        "config map": (core.read_namespaced_config_map, CONFIG_MAP),
        "service account": (core.read_namespaced_service_account, SERVICE_ACCOUNT),
    }
    return [
        checked("GPU nodes", lambda: _gpu_nodes(core)),
        *(
            checked(kind, lambda read=read, name=name: _exists(read, name, namespace))  # type: ignore[misc]
            for kind, (read, name) in named.items()
        ),
    ]


def _core() -> Any:
    from kubernetes.client import CoreV1Api

    from shellv_core.cluster.connection import Cluster
    from shellv_core.errors import ClusterError

    try:
        # Without its retries: a person waits for the table.
        return CoreV1Api(Cluster().api)
    except ClusterError as error:
        why, _, remedy = str(error).partition("). ")
        raise NotChecked(f"{why})", remedy) from None


def _asked(ask: Callable[[], Any], what: str) -> Any:
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        return ask()
    except ApiException as error:
        if error.status == HTTPStatus.NOT_FOUND:
            return None
        raise NotChecked(
            f"{what}: Kubernetes answers {error.status} {error.reason}", f"let this user read {what}."
        ) from None
    except HTTPError as error:
        raise NotChecked(
            f"Kubernetes does not answer ({type(error).__name__})", "check KUBECONFIG and its context."
        ) from None


def _gpu_nodes(core: Any) -> str:
    listing = _asked(lambda: core.list_node(_request_timeout=TIMEOUT_SECONDS), "nodes")
    found: Counter[str] = Counter()
    nodes = 0
    for node in listing.items if listing else ():
        gpus = int((node.status.allocatable or {}).get(ACCELERATOR, 0))
        ready = any(each.type == "Ready" and each.status == "True" for each in node.status.conditions or ())
        if gpus and ready and not node.spec.unschedulable:
            nodes += 1
            labels = node.metadata.labels or {}
            found[next((labels[each] for each in PRODUCT_LABELS if each in labels), "unknown model")] += gpus
    if not found:
        raise Failed(
            f"no ready node offers {ACCELERATOR}",
            "add a GPU pool and NVIDIA's device plugin; without GPUs, run with the profile cpu. A pool that grows from"
            " zero shows no node until a task asks for one.",
        )
    return f"{nodes} nodes: " + ", ".join(f"{count} x {product}" for product, count in sorted(found.items()))


def _exists(read: Callable[..., Any], name: str, namespace: str) -> str:
    if _asked(lambda: read(name, namespace, _request_timeout=TIMEOUT_SECONDS), f"{namespace}/{name}") is None:
        raise Failed(f"{name} is not in namespace {namespace}", "apply the manifests: `kubectl apply -k k8s/...`.")
    return f"{name} is in namespace {namespace}"
