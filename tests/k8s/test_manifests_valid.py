"""Every object of every overlay, as strictly as the API server's own validation, and that this can tell."""

from __future__ import annotations

from typing import Any

import pytest

from tests.k8s.rendering import OVERLAYS, REPOSITORY, ROOTS, named, of_kind, pods, render
from tests.k8s.validation import InvalidError, validate


@pytest.mark.parametrize("root", ROOTS)
def test_every_object_is_valid(root: str) -> None:
    objects = render(root)
    assert objects
    for each in objects:
        validate(each)


def test_every_component_is_used_or_shown() -> None:
    shown = (REPOSITORY / "docs" / "kubernetes.md").read_text()
    for path in (REPOSITORY / "k8s" / "components").iterdir():
        assert f"components/{path.name}" in shown, path


@pytest.mark.parametrize("component", ["gateway", "queue-scaling", "monitoring"])
def test_components_that_no_overlay_has_are_valid_too(component: str, tmp_path: Any) -> None:
    import subprocess

    import yaml

    from tests.k8s.rendering import kubectl

    relative = "../" * len(tmp_path.parts[1:]) + str(REPOSITORY / "k8s").lstrip("/")
    (tmp_path / "kustomization.yaml").write_text(
        f"resources: [{relative}/base]\ncomponents: [{relative}/components/{component}]\n"
    )
    done = subprocess.run([kubectl(), "kustomize", str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    for each in yaml.safe_load_all(done.stdout):
        validate(each)


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
        ("k8s/overlays/cpu", "ConfigMap", ["kind"], "ConfigMop"),
        ("k8s/overlays/cpu", "ConfigMap", ["apiVersion"], "example.com/v1"),
    ],
)
def test_what_an_api_server_would_refuse_is_refused(root: str, kind: str, path: list[Any], value: Any) -> None:
    with pytest.raises(InvalidError):
        validate(broken(root, kind, path, value))


@pytest.mark.parametrize("root", ROOTS)
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


@pytest.mark.parametrize("root", [each for each in OVERLAYS if each.split("/")[-1] not in ("kserve", "rollouts")])
def test_the_tracks_differ_in_label_and_replicas_alone(root: str) -> None:
    objects = render(root)
    stable, canary = named(objects, "Deployment", "shellv-serve"), named(objects, "Deployment", "shellv-serve-canary")
    assert canary["spec"]["replicas"] == 0
    for each in (stable, canary):
        each["spec"]["template"]["spec"].pop("topologySpreadConstraints", None)
    if root != "k8s/overlays/dev":
        assert canary["spec"]["template"]["spec"] == stable["spec"]["template"]["spec"]
