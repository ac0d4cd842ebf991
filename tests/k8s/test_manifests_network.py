"""The table of docs/kubernetes.md against the network policies: what it lists is allowed, and nothing else is."""

from __future__ import annotations

import re

import pytest

from tests.k8s.network import Peer, may_talk, peer_of
from tests.k8s.rendering import REPOSITORY, Manifest, render

DOCUMENT = (REPOSITORY / "docs" / "kubernetes.md").read_text(encoding="utf-8")
PORTS = (53, 80, 443, 5000, 5432, 6443, 8000, 8001, 8080, 8333, 8887, 8888, 8889, 9333, 29500)


# What the stores of `dev` stand in for.
OUTSIDE = ("MLflow elsewhere", "public address")


def elsewhere(name: str, **labels: str) -> dict[str, str]:
    return {"kubernetes.io/metadata.name": name, **{key.replace("__", "/"): value for key, value in labels.items()}}


def peers(objects: list[Manifest]) -> dict[str, Peer]:
    """Everybody that the table knows, and some that it must not."""
    runtime = render("k8s/cluster/training")
    known = {
        "server": peer_of(objects, "shellv-serve"),
        "pipeline task": Peer({"workflows.argoproj.io/workflow": "run-1"}),
        "trainer": peer_of(runtime, "shellv-torch"),
        "another pod here": Peer({"app": "shell"}),
        "DNS": Peer({"k8s-app": "kube-dns"}, elsewhere("kube-system")),
        "Kubeflow Pipelines": Peer({"app": "ml-pipeline"}, elsewhere("kubeflow")),
        "MLflow elsewhere": Peer({"app": "mlflow"}, elsewhere("mlflow")),
        "ingress or gateway": Peer({}, {**elsewhere("ingress"), "shellv.dev/routes-requests": "true"}),
        "Prometheus": Peer({}, {**elsewhere("monitoring"), "shellv.dev/scrapes-metrics": "true"}),
        "another namespace": Peer({"app.kubernetes.io/name": "shellv-serve"}, elsewhere("default")),
        "public address": Peer(address="52.216.8.1"),
        "private address": Peer(address="10.20.30.40"),
        "metadata service": Peer(address="169.254.169.254"),
    }
    for name in ("mlflow", "postgres", "seaweedfs"):
        try:
            known[name] = peer_of(objects, name)
        except KeyError:
            continue
    return known


def table(heading: str) -> set[tuple[str, str, str]]:
    section = DOCUMENT.partition(f"### {heading}\n")[2].partition("\n#")[0]
    rows = re.findall(r"^\| ([^|]+?) \| ([^|]+?) \| ([^|]+?) \|", section, re.MULTILINE)
    return {(source, target, port) for source, target, ports in rows[2:] for port in ports.split(", ")}


@pytest.mark.parametrize(
    ("root", "headings"),
    [
        ("k8s/overlays/a100-80", ("Who may talk to whom", "With the Prometheus operator")),
        ("k8s/overlays/cpu", ("Who may talk to whom",)),
        ("k8s/overlays/kserve", ("Who may talk to whom",)),
        ("k8s/overlays/dev", ("Who may talk to whom", "With stores of its own")),
    ],
)
def test_the_table_is_what_the_policies_allow(root: str, headings: tuple[str, ...]) -> None:
    objects = render(root)
    if root.endswith("kserve"):
        objects += [{"kind": "Deployment", "metadata": {"name": "shellv-serve"}, "spec": _as_deployment(objects)}]
    known = peers(objects)
    allowed = {
        (source, target, "any" if target == "trainer" else str(port))
        for source in known
        for target in known
        for port in PORTS
        if (known[source].is_ours or known[target].is_ours) and may_talk(objects, known[source], known[target], port)
    }
    listed = set().union(*(table(heading) for heading in headings))
    if root.endswith("dev"):
        listed = {row for row in listed if row[0] not in ("server", "trainer") or row[1] not in OUTSIDE}
    assert allowed == listed


def _as_deployment(objects: list[Manifest]) -> dict[str, object]:
    [predictor] = [each["spec"]["predictor"] for each in objects if each["kind"] == "InferenceService"]
    return {"template": {"metadata": {"labels": predictor["labels"]}, "spec": predictor}}


def test_names_are_resolved_by_udp_too() -> None:
    objects = render("k8s/overlays/cpu")
    known = peers(objects)
    assert may_talk(objects, known["server"], known["DNS"], 53, "UDP")
    assert not may_talk(objects, known["server"], known["public address"], 53, "UDP")


def test_without_a_policy_everything_is_open() -> None:
    assert may_talk([], Peer(), Peer(address="169.254.169.254"), 80)
