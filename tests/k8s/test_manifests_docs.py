"""The commands of docs/kubernetes.md: rendered where they render, and their names held against the manifests."""

from __future__ import annotations

import re
import shlex
import subprocess

import pytest

from pipelines.__main__ import _parser
from tests.k8s.policies import EXTERNAL
from tests.k8s.rendering import K8S, OVERLAYS, REPOSITORY, ROOTS, kubectl, named, pods, render

DOCUMENT = (REPOSITORY / "docs" / "kubernetes.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", DOCUMENT, re.MULTILINE | re.DOTALL)
LINES = [line for block in BLOCKS for line in block.splitlines() if not line.startswith(("k8s/", "  "))]
KUBECTL = [shlex.split(line) for line in LINES if line.startswith("kubectl ")]


def test_every_line_is_one_that_is_checked_here() -> None:
    for line in LINES:
        assert line.startswith(("kubectl ", "python -m pipelines ", "shellv ", "make test-containers", "htpasswd ")), (
            line
        )
    assert len(KUBECTL) > 15


@pytest.mark.parametrize("words", [each for each in KUBECTL if "-k" in each], ids=" ".join)
def test_what_is_applied_renders(words: list[str]) -> None:
    folder = words[words.index("-k") + 1]
    # A base has no namespace of its own: applied, it would land in whichever is current.
    assert folder in ROOTS
    assert render(folder)


@pytest.mark.parametrize("words", [each for each in KUBECTL if each[1] == "kustomize"], ids=" ".join)
def test_what_only_renders_runs(words: list[str]) -> None:
    done = subprocess.run([kubectl(), *words[1:]], cwd=REPOSITORY, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert "kind: Deployment" in done.stdout


@pytest.mark.parametrize("words", KUBECTL, ids=" ".join)
def test_kubectl_knows_the_command_and_its_options(words: list[str]) -> None:
    verbs = [each for each in words[1:] if not each.startswith("-") and each != "shellv"]
    count = 3 if verbs[:2] == ["create", "secret"] else 2 if verbs[0] in ("create", "rollout") else 1
    done = subprocess.run([kubectl(), *verbs[:count], "--help"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    for option in [each.partition("=")[0] for each in words if each.startswith("-")]:
        known = rf"(^|[ ,]){re.escape(option)}[=,\s]"
        assert option == "--namespace" or re.search(known, done.stdout, re.MULTILINE), option


def test_pipelines_commands_are_known() -> None:
    lines = [line.partition(" | ")[0] for line in LINES if line.startswith("python -m pipelines ")]
    assert lines
    for line in lines:
        options = _parser().parse_args(shlex.split(line)[3:])
        assert options.name in {path.parent.name for path in K8S.glob("*/*/kustomization.yaml")}


def test_every_name_is_there() -> None:
    objects = render("k8s/overlays/a100-80")
    for kind, name in re.findall(r"\b(deployment|service)/([a-z-]+)", "\n".join(LINES)):
        assert named(objects, kind.capitalize(), name)
    secrets = {words[words.index("secret") + 2] for words in KUBECTL if "secret" in words}
    assert secrets == {name for kind, name in EXTERNAL if kind == "Secret"}
    listed = set(re.findall(r"^\| `(shellv-[a-z-]+)` \|", DOCUMENT, re.MULTILINE))
    assert listed == secrets
    text = "\n".join(path.read_text() for path in K8S.rglob("*.yaml"))
    for label in re.findall(r"shellv\.dev/[a-z-]+", DOCUMENT):
        assert label in text or label == "shellv.dev/version"  # which deploy writes


def test_the_secrets_keys_are_those_that_are_read() -> None:
    [password] = {
        variable["valueFrom"]["secretKeyRef"]["key"]
        for _, _, spec in pods(render("k8s/overlays/dev"))
        for container in spec["containers"]
        for variable in container.get("env", [])
        if variable.get("valueFrom", {}).get("secretKeyRef", {}).get("name") == "shellv-postgres"
    }
    assert f"--from-file={password}=" in DOCUMENT


def test_every_overlay_and_folder_is_told() -> None:
    listed = re.findall(r"^\| `(k8s/overlays/[^`]+)` \|", DOCUMENT, re.MULTILINE)
    assert sorted(listed) == sorted(OVERLAYS)
    for folder in re.findall(r"`(k8s/[a-z0-9/-]+)`", DOCUMENT):
        assert (REPOSITORY / folder).exists(), folder
