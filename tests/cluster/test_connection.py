"""How the client finds a cluster: from a pod, and from outside through TLS with the cluster's own authority."""

from __future__ import annotations

import asyncio
import base64
import ssl
import sys
from pathlib import Path

import pytest
import yaml

from shellv_core.cluster import connection
from shellv_core.cluster.connection import DEPLOYMENTS, Cluster
from shellv_core.endpoint.client import EndpointClient, EndpointError
from shellv_core.errors import ClusterError
from tests.cluster.conftest import kubeconfig
from tests.cluster.deployment_controller import deployment
from tests.cluster.kubernetes_api import KubernetesApi
from tests.cluster.kubernetes_http import TOKEN, serving
from tests.endpoint.chat_server import chat_server
from tests.submit.test_authentication import certificate


@pytest.fixture
def secure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """An API server that speaks TLS, its address and the certificate of its authority."""
    monkeypatch.delenv("KUBERNETES_SERVICE_HOST", raising=False)
    monkeypatch.setattr(connection, "BACKOFF_SECONDS", 0.0)
    ca, key = certificate(tmp_path)
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    tls.load_cert_chain(ca, key)
    api = KubernetesApi()
    api.put("deployments", deployment("shellv-serve", "stable", 1))
    with serving(api, tls) as url:
        yield api, url, ca


def test_a_pod_uses_its_service_account_and_names_services(secure, tmp_path, monkeypatch):
    _, url, ca = secure
    (tmp_path / "token").write_text(TOKEN)
    (tmp_path / "namespace").write_text("trials\n")
    host, port = url.removeprefix("https://").split(":")
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", host)
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", port)
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_TOKEN_FILENAME", str(tmp_path / "token"))
    monkeypatch.setattr("kubernetes.config.incluster_config.SERVICE_CERT_FILENAME", str(ca))
    monkeypatch.setattr(connection, "NAMESPACE_FILE", tmp_path / "namespace")
    cluster = Cluster()
    assert cluster.namespace == "trials"
    assert cluster.get(DEPLOYMENTS, "shellv-serve")
    assert cluster.service("shellv-serve", 8000).url == "http://shellv-serve.trials:8000/v1"
    assert Cluster("other").namespace == "other"


def test_from_outside_a_service_is_asked_through_the_api_server(secure, tmp_path, monkeypatch):
    api, url, ca = secure
    settings = kubeconfig(url)
    settings["clusters"][0]["cluster"]["certificate-authority-data"] = base64.b64encode(ca.read_bytes()).decode()
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(settings))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    address = Cluster().service("shellv-serve", 8000)
    assert TOKEN not in repr(address)
    client = EndpointClient(address.url, address.token, tls=address.tls)
    with pytest.raises(EndpointError, match="no endpoints available"):
        asyncio.run(client.model())
    with chat_server() as server:
        api.services = lambda name: server.url.removesuffix("/v1")
        assert asyncio.run(client.answer([{"role": "user", "content": "hello"}])) == "re: hello"
        with pytest.raises(EndpointError, match=r"does not answer .*CERTIFICATE_VERIFY_FAILED"):
            asyncio.run(EndpointClient(address.url, address.token).model())


def test_an_authority_that_is_not_known(secure, tmp_path, monkeypatch):
    (tmp_path / "kubeconfig").write_text(yaml.safe_dump(kubeconfig(secure[1])))
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    with pytest.raises(ClusterError, match=r"does not answer .*certificate verify failed") as caught:
        Cluster().get(DEPLOYMENTS, "shellv-serve")
    assert "\n" not in str(caught.value)


def test_an_environment_without_the_client(monkeypatch):
    monkeypatch.setitem(sys.modules, "kubernetes", None)
    with pytest.raises(ClusterError, match="install the extra 'cluster'"):
        Cluster()
