"""Fixtures of the tracking suites."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from mlflow_server import mlflow_server


@pytest.fixture(scope="session")
def server_address(tmp_path_factory: pytest.TempPathFactory, tracking_database: Path) -> Iterator[str]:
    """A real MLflow server for the session: it takes up to a minute to start."""
    folder = tmp_path_factory.mktemp("mlflow-server")
    with mlflow_server(folder, Path(shutil.copyfile(tracking_database, folder / "mlflow.db"))) as address:
        yield address


@pytest.fixture(params=["sqlite", pytest.param("server", marks=pytest.mark.slow)])
def tracking_service(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The same test over an SQLite file and over a server."""
    if request.param == "sqlite":
        request.getfixturevalue("tracking_store")
    else:
        monkeypatch.setenv("MLFLOW_TRACKING_URI", request.getfixturevalue("server_address"))
    return str(request.param)
