"""The whole pipeline once, at the smoke preset, as `make run` starts it; every test here stands on its outputs."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from shellv_core.storage.seaweedfs import S3_VARIABLES, embedded_s3

REPOSITORY = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Project:
    """A project folder with one finished pipeline run, and how programs run in it."""

    home: Path
    output: str

    def run(self, *arguments: str, timeout: float = 280, **environment: str) -> subprocess.CompletedProcess[str]:
        """Run ``python -m ARGUMENTS`` in the repository with this project folder."""
        return subprocess.run(
            [sys.executable, "-m", *arguments],
            cwd=REPOSITORY,
            env=self.environment(environment),
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def environment(self, extra: Mapping[str, str] | None = None) -> dict[str, str]:
        """The user's environment with this project folder and nothing of the test session's."""
        kept = {key: value for key, value in os.environ.items() if not key.startswith(("AWS_", "MLFLOW_"))}
        return {**kept, "SHELLV_HOME": str(self.home), **(extra or {})}


@pytest.fixture(scope="session")
def project(tmp_path_factory: pytest.TempPathFactory) -> Project:
    """`python -m pipelines run --preset smoke` on an empty project folder."""
    empty = Project(tmp_path_factory.mktemp("project") / "home", "")
    done = empty.run("pipelines", "run", "--preset", "smoke", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    return Project(empty.home, done.stdout)


@pytest.fixture(scope="session")
def project_s3(project: Project) -> Iterator[None]:
    """The project's own S3 server, up for the tests that read or go on from its outputs."""
    before = {name: os.environ.pop(name, None) for name in S3_VARIABLES}
    with embedded_s3(project.home / "s3"):
        yield
    os.environ.update({name: value for name, value in before.items() if value is not None})
