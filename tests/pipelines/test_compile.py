"""What is committed is what the source makes, and one function makes it for every registry, tag and lock file."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import shellv_core
from pipelines.__main__ import main
from pipelines.compile import PIPELINES, compiled_yaml
from shellv_core.errors import ConfigError
from tests.pipelines.compiling import tasks_of

REPOSITORY = Path(__file__).resolve().parents[2]
DIGESTS = {name: f"sha256:{number:064x}" for number, name in enumerate(("control", "train", "serve"), 1)}


def compiled(pipeline: str, profile: str, **environment: str) -> str:
    """From a process of its own: images are named when the components are imported."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith("SHELLV_")}
    program = f"from pipelines.compile import compiled_yaml; print(compiled_yaml({pipeline!r}, {profile!r}), end='')"
    done = subprocess.run(
        [sys.executable, "-c", program],
        cwd=REPOSITORY,
        env={**kept, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def images(text: str) -> set[str]:
    spec = next(yaml.safe_load_all(text))
    return {each["container"]["image"] for each in spec["deploymentSpec"]["executors"].values()}


def test_committed_files_are_what_the_source_makes() -> None:
    assert main(["compile", "--check"]) == 0


def test_a_stale_file_is_named(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("pipelines.compile.committed_files", lambda: [(tmp_path / "stale.yaml", "new")])
    (tmp_path / "stale.yaml").write_text("old")
    assert main(["compile", "--check"]) == 1
    assert "stale.yaml" in capsys.readouterr().err


def test_compiling_is_deterministic() -> None:
    assert compiled("shellv-align", "a100-40", PYTHONHASHSEED="1") == compiled_yaml("shellv-align", "a100-40")


def test_registry_and_tag_come_from_the_environment() -> None:
    tag = shellv_core.__version__
    assert images(compiled_yaml("shellv")) == {f"localhost/shellv-control:{tag}", f"localhost/shellv-train:{tag}"}
    other = images(compiled("shellv-evaluate", "cpu", SHELLV_REGISTRY="registry.example/team/", SHELLV_TAG="abc"))
    assert other == {"registry.example/team/shellv-control:abc", "registry.example/team/shellv-train:abc"}


@pytest.mark.parametrize("name", PIPELINES)
def test_a_locked_pipeline_names_its_images_by_digest(name: str, tmp_path: Path) -> None:
    lock = tmp_path / "images.lock.yaml"
    entries = {
        key: {"reference": f"r.example:5000/shellv-{key}:7", "digest": digest} for key, digest in DIGESTS.items()
    }
    lock.write_text(yaml.safe_dump({"images": entries}))
    text = compiled_yaml(name, "cpu", lock)
    assert images(text) <= {f"r.example:5000/shellv-{key}@{digest}" for key, digest in DIGESTS.items()}
    for task in tasks_of(*yaml.safe_load_all(text)):
        variables = {each["name"]: each["value"] for each in task.container["env"]}
        assert variables == {
            "SHELLV_IMAGE": task.container["image"],
            "SHELLV_PIPELINE_VERSION": shellv_core.__version__,
        }


def test_a_lock_file_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="make images"):
        compiled_yaml("shellv", "cpu", tmp_path / "none.yaml")


def test_another_cluster_s_files_go_to_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compile", "--profile", "h100", "--output", str(tmp_path)]) == 0
    written = sorted(path.name for path in tmp_path.iterdir())
    assert written == sorted(f"{name}-h100.yaml" for name in PIPELINES)
    assert capsys.readouterr().out.count("h100.yaml") == len(PIPELINES)
    assert main(["compile", "--profile", "h100", "--check"]) == 2
    assert main(["compile", "--profile", "h10", "--output", str(tmp_path)]) == 2
    assert "did you mean 'h100'" in capsys.readouterr().err


def test_unknown_pipelines_are_refused() -> None:
    with pytest.raises(ConfigError, match="did you mean 'shellv-data'"):
        compiled_yaml("shellv-dat")
