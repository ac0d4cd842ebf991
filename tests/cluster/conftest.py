from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from shellv_core.cluster import connection, following, logs
from shellv_core.cluster.connection import Cluster
from shellv_core.cluster.permissions import PERMISSIONS
from tests.cluster.apiserver.running import Server, running
from tests.cluster.kubernetes_api import KubernetesApi
from tests.cluster.kubernetes_http import TOKEN, serving


@pytest.fixture(scope="session")
def apiserver(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A real API server for TrainJobs; `make test-apiserver` builds it."""
    with running(tmp_path_factory.mktemp("apiserver")) as server:
        yield server


@pytest.fixture
def stand_in() -> KubernetesApi:
    """The server's state."""
    return KubernetesApi()


@pytest.fixture
def api(stand_in: KubernetesApi, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[KubernetesApi]:
    """An API server, a kubeconfig file that names it, and a client without patience."""
    with serving(stand_in) as url:
        path = tmp_path / "kubeconfig"
        path.write_text(yaml.safe_dump(kubeconfig(url)))
        monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
        monkeypatch.setenv("KUBECONFIG", str(path))
        monkeypatch.setattr(connection, "BACKOFF_SECONDS", 0.001)
        monkeypatch.setattr(following, "PAUSE_SECONDS", 0.001)
        monkeypatch.setattr(logs, "PAUSE_SECONDS", 0.01)
        yield stand_in
    allowed = {(each.group, each.resource, verb) for each in PERMISSIONS for verb in each.verbs}
    # From outside of the cluster alone, see there.
    allowed |= {("", "services/proxy", verb) for verb in ("get", "create")}
    assert set(stand_in.asked) <= allowed, "the account of pipeline tasks could not do this"


@pytest.fixture
def cluster(api: KubernetesApi) -> Cluster:
    """The client's side."""
    return Cluster()


def kubeconfig(url: str, token: str = TOKEN) -> dict:
    return {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test", "namespace": "shellv"}}],
        "clusters": [{"name": "test", "cluster": {"server": url}}],
        "users": [{"name": "test", "user": {"token": token}}],
    }
