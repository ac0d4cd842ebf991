"""Every object of every overlay, as strictly as the API server's own validation, and that this can tell."""

from __future__ import annotations

from typing import Any

import pytest

from tests.k8s.rendering import K8S, OPTIONAL, REPOSITORY, ROOTS, SERVERS, named, of_kind, pods, render
from tests.k8s.validation import InvalidError, validate


@pytest.mark.parametrize("root", [*ROOTS, *OPTIONAL])
def test_every_object_is_valid(root: str) -> None:
    objects = render(root)
    assert objects
    for each in objects:
        validate(each)


def test_every_component_is_used_or_shown() -> None:
    shown = (REPOSITORY / "docs" / "kubernetes.md").read_text()
    for path in (REPOSITORY / "k8s" / "components").iterdir():
        assert f"components/{path.name}" in shown, path


def test_every_component_is_in_an_overlay_or_tested_alone() -> None:
    taken = "".join(path.read_text() for path in (K8S / "overlays").glob("*/kustomization.yaml"))
    for path in (K8S / "components").iterdir():
        assert (f"components/{path.name}\n" in taken) != (f"k8s/components/{path.name}" in OPTIONAL), path


def broken(root: str, kind: str, path: list[Any], value: Any) -> dict[str, Any]:
    """One object of `root` with one field added or changed."""
    manifest = of_kind(render(root), kind)[0]
    place = manifest
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    return manifest


RUNTIME_POD = ["spec", "template", "spec", "replicatedJobs", 0, "template", "spec", "template", "spec"]


@pytest.mark.parametrize(
    ("root", "kind", "path", "value"),
    [
        ("k8s/overlays/cpu", "Deployment", ["spec", "replica"], 2),
        ("k8s/overlays/cpu", "Deployment", ["spec", "template", "spec", "containers", 0, "image"], 3),
        ("k8s/overlays/cpu", "Service", ["spec", "selectors"], {}),
        ("k8s/overlays/cpu", "NetworkPolicy", ["spec", "podSelectors"], {}),
        ("k8s/overlays/kserve", "InferenceService", ["spec", "predictor", "canaryPercent"], 10),
        ("k8s/overlays/kserve", "InferenceService", ["spec", "predictor", "containers", 0, "name"], "serve"),
        ("k8s/overlays/kserve", "InferenceService", ["spec", "predictor", "containers", 0, "livenessProb"], {}),
        ("k8s/overlays/rollouts", "Rollout", ["spec", "strategy", "canary", "weight"], 10),
        ("k8s/overlays/rollouts", "AnalysisTemplate", ["spec", "metrics", 0, "failureLimit"], "none"),
        ("k8s/overlays/a100-80", "ServiceMonitor", ["spec", "endpoints", 0, "interval"], "often"),
        ("k8s/overlays/a100-80", "LocalQueue", ["spec", "queue"], "shellv"),
        ("k8s/cluster/kueue", "ResourceFlavor", ["metadata", "namespace"], "shellv"),
        ("k8s/cluster/training", "ClusterTrainingRuntime", ["spec", "mlPolicy", "numNodez"], 2),
        ("k8s/cluster/training", "ClusterTrainingRuntime", [*RUNTIME_POD, "containers", 0, "volumeMount"], []),
        ("k8s/components/gateway", "HTTPRoute", ["spec", "rules", 0, "backendRefs", 0, "weights"], 1),
        ("k8s/overlays/cpu", "ConfigMap", ["kind"], "ConfigMop"),
        ("k8s/overlays/cpu", "ConfigMap", ["apiVersion"], "example.com/v1"),
        ("k8s/components/ingress", "Ingress", ["spec", "rules", 0, "hosts"], "example.com"),
    ],
)
def test_what_an_api_server_would_refuse_is_refused(root: str, kind: str, path: list[Any], value: Any) -> None:
    with pytest.raises(InvalidError):
        validate(broken(root, kind, path, value))


@pytest.mark.parametrize("root", [*ROOTS, *OPTIONAL])
def test_cluster_wide_objects_stand_apart(root: str) -> None:
    cluster_wide = {"Namespace", "ClusterTrainingRuntime", "ClusterQueue", "ResourceFlavor"}
    for each in render(root):
        has_namespace = "namespace" in each["metadata"]
        assert has_namespace == (each["kind"] not in cluster_wide), each["kind"]


def test_kserve_serves_by_the_very_pod_of_the_deployment() -> None:
    [(_, _, deployed)] = [
        each for each in pods(render("k8s/overlays/cpu")) if each[0]["metadata"]["name"] == "shellv-serve"
    ]
    predictor = of_kind(render("k8s/overlays/kserve"), "InferenceService")[0]["spec"]["predictor"]
    del deployed["topologySpreadConstraints"]
    deployed["containers"][0]["name"] = "kserve-container"
    assert {key: predictor[key] for key in deployed} == deployed


@pytest.mark.parametrize("root", [each for each in SERVERS if not each.endswith("rollouts")])
def test_the_tracks_differ_in_label_and_replicas_alone(root: str) -> None:
    objects = render(root)
    stable, canary = named(objects, "Deployment", "shellv-serve"), named(objects, "Deployment", "shellv-serve-canary")
    assert canary["spec"]["replicas"] == 0
    for each in (stable, canary):
        each["spec"]["template"]["spec"].pop("topologySpreadConstraints", None)
    if root != "k8s/overlays/dev":
        assert canary["spec"]["template"]["spec"] == stable["spec"]["template"]["spec"]
