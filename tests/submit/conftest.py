"""A Kubeflow Pipelines server and `python -m pipelines` in this process, without waiting between requests."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest

from pipelines.__main__ import main
from pipelines.client import compiled, connection, waiting
from pipelines.compile import compiled_yaml
from tests.pipelines.kfp_api_server import KfpServer, serving

TOKEN = "t0ken-of-the-test"
ROOT = "root_uri=s3://bucket/prefix"


@dataclass
class Said:
    """What a command did."""

    code: int
    out: str
    err: str


Command = Callable[..., Said]


@pytest.fixture(autouse=True)
def without_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(connection, "BACKOFF_SECONDS", 0.0)
    monkeypatch.setattr(waiting, "POLL_SECONDS", 0.0)


@pytest.fixture(autouse=True)
def own_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith(("KF_PIPELINES_", "KUBERNETES_", "SHELLV_TAG"))]:
        monkeypatch.delenv(name)


@pytest.fixture(autouse=True)
def pushed_images(monkeypatch: pytest.MonkeyPatch) -> None:
    """The pipelines as compiled with SHELLV_REGISTRY, which counts only before the components' first import."""
    monkeypatch.setattr(compiled, "compiled_yaml", pushed)


@functools.cache
def pushed(name: str, *chosen: Any) -> str:
    return compiled_yaml(name, *chosen).replace("localhost/", "registry.example/")


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[KfpServer]:
    """A server that takes the token `TOKEN`, which is in the environment."""
    with serving(KfpServer(token=TOKEN)) as server:
        monkeypatch.setenv("KF_PIPELINES_ENDPOINT", server.url)
        monkeypatch.setenv("KF_PIPELINES_TOKEN", TOKEN)
        yield server


@pytest.fixture
def command(capsys: pytest.CaptureFixture[str]) -> Command:
    """``command("submit", ...)`` runs a command; no secret is ever in what it says."""

    def run(*arguments: str) -> Said:
        capsys.readouterr()
        code = main(arguments)
        said = capsys.readouterr()
        assert TOKEN not in said.out + said.err
        assert "Traceback" not in said.err
        return Said(code, said.out, said.err)

    return run
