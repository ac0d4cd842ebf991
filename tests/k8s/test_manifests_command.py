"""``python -m pipelines manifests``."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import yaml

from components.images import ImagesLock, LockedImage
from pipelines.__main__ import main
from pipelines.commands import manifests
from shellv_core import __version__
from tests.k8s.rendering import ROOTS, kubectl, pods, render

DIGEST = f"sha256:{'0123456789abcdef' * 4}"


@pytest.fixture(autouse=True)
def _kubectl_on_the_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", f"{Path(kubectl()).parent}{os.pathsep}{os.environ['PATH']}")
    for name in ("SHELLV_REGISTRY", "SHELLV_TAG"):
        monkeypatch.delenv(name, raising=False)


def printed(capsys: pytest.CaptureFixture[str], *arguments: str) -> list[dict[str, object]]:
    capsys.readouterr()
    assert main(["manifests", *arguments]) == 0
    return list(yaml.safe_load_all(capsys.readouterr().out))


@pytest.mark.parametrize("root", ROOTS)
def test_without_settings_it_is_the_overlay_itself(root: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, root.rpartition("/")[2]) == render(root)


@pytest.mark.parametrize("name", ["a100-80", "kserve", "training"])
def test_images_of_the_lock_file_come_by_digest(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = ImagesLock(
        images={
            each: LockedImage(reference=f"registry.example.com:5000/team/shellv-{each}:{__version__}", digest=DIGEST)
            for each in ("control", "train", "serve")
        },
    )
    path = tmp_path / "images.lock.yaml"
    path.write_text(yaml.safe_dump(lock.model_dump(mode="json")))
    monkeypatch.setattr("components.images.LOCK_PATH", path)
    images = [each["image"] for _, _, spec in pods(printed(capsys, name, "--locked")) for each in spec["containers"]]
    role = "train" if name == "training" else "serve"
    assert set(images) == {f"registry.example.com:5000/team/shellv-{role}@{DIGEST}"}


def test_a_registry_of_ones_own(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("SHELLV_REGISTRY", "registry.example.com/team")
    monkeypatch.setenv("SHELLV_TAG", "1.2.3")
    found = [each["image"] for _, _, spec in pods(printed(capsys, "dev")) for each in spec["containers"]]
    assert found.count("registry.example.com/team/shellv-serve:1.2.3") == 2
    assert not any("localhost" in each for each in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["a100-81"], "did you mean 'a100-80'"), (["cpu", "--locked"], "run `make images`")],
)
def test_what_is_missing_is_named(
    arguments: list[str], message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("components.images.LOCK_PATH", Path("/nowhere/images.lock.yaml"))
    assert main(["manifests", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_without_kubectl(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    assert main(["manifests", "cpu"]) == 2
    assert "kubectl is not installed" in capsys.readouterr().err


def test_help_lists_what_there_is(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["manifests", "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert ", ".join(manifests.roots()) in said
    assert set(manifests.roots()) == {root.rpartition("/")[2] for root in ROOTS}
