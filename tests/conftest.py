"""Fixtures that several suites share: a project folder of the test's own and a real S3 server."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from xdist.scheduler import LoadScopeScheduling

from shellv_core.storage.seaweedfs import S3_VARIABLES, embedded_s3

SHARED = Path(__file__).resolve().parents[2] / "shared"
#: They share one run of the whole pipeline.
ONE_RUN = ("tests/e2e/test_kill.py", "tests/e2e/test_one_component.py", "tests/e2e/test_pipeline.py")


class FileScheduling(LoadScopeScheduling):
    """Keeps each file on one worker, since its fixtures are shared, and so the files of `ONE_RUN`.

    By the file's name and not by xdist's own groups: those write to a private field that pytest 9.2 no longer has.
    """

    def _split_scope(self, nodeid: str) -> str:
        file = nodeid.partition("::")[0]
        return ONE_RUN[0] if file in ONE_RUN else file


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> LoadScopeScheduling:
    """How tests are shared among the workers of ``-n``."""
    return FileScheduling(config, log)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """A program that a test runs sets logging up, on a stream that is closed when the test ends."""
    root, library = logging.getLogger(), logging.getLogger("shellv_core")
    handlers, levels = set(root.handlers), (root.level, library.level)
    yield
    root.handlers[:] = [each for each in root.handlers if each in handlers]
    root.setLevel(levels[0])
    library.setLevel(levels[1])


@pytest.fixture(scope="session", autouse=True)
def session_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A project folder for what module fixtures make: theirs run before any test's own is set."""
    folder = tmp_path_factory.mktemp("home")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHELLV_HOME", str(folder))
        yield folder


@pytest.fixture(autouse=True)
def project_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A project folder below the test's own temporary folder."""
    folder = tmp_path / "project-folder"
    monkeypatch.setenv("SHELLV_HOME", str(folder))
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_RUN_ID", "MLFLOW_EXPERIMENT_ID"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture(scope="session")
def tracking_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty MLflow database, made once: creating its tables takes seconds."""
    from shellv_core.tracking.runs import open_client

    path = tmp_path_factory.mktemp("tracking") / "mlflow.db"
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{path}")
        open_client()
    return path


@pytest.fixture
def tracking_store(project_folder: Path, tracking_database: Path) -> Path:
    """The test's own copy of the empty MLflow database, where the project folder keeps it."""
    project_folder.mkdir(parents=True, exist_ok=True)
    return Path(shutil.copyfile(tracking_database, project_folder / "mlflow.db"))


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """One SeaweedFS server for the session; its AWS_* variables."""
    before = {name: os.environ.pop(name, None) for name in S3_VARIABLES}
    with embedded_s3(tmp_path_factory.mktemp("s3")):
        environment = {name: value for name, value in os.environ.items() if name.startswith(("AWS_", "MLFLOW_S3"))}
        for name in environment:
            del os.environ[name]
        yield environment
        os.environ.update(environment)
    os.environ.update({name: value for name, value in before.items() if value is not None})


@pytest.fixture
def bucket_uri(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> str:
    """A prefix of this test's own on the real S3 server, its credentials in the environment."""
    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    return f"s3://shellv/{tmp_path.name}"


@pytest.fixture(params=["file", "s3"])
def store_uri(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The same test over a folder and over the S3 server."""
    if request.param == "file":
        return (tmp_path / "store").as_uri()
    uri: str = request.getfixturevalue("bucket_uri")
    return uri


@pytest.fixture(scope="session")
def shared() -> Path:
    """Real benchmark files and photos where they are at hand."""
    if not SHARED.is_dir():
        pytest.skip("no folder of real benchmark files beside the project")
    return SHARED
