from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import get_args

import pytest
import yaml

from components.images import ImageName
from pipelines.client import doctor
from shellv_core.storage import list_uris, status
from shellv_core.storage.probe import probe
from shellv_core.storage.stores import S3Store
from tests.pipelines.kfp_api_server import KfpServer
from tests.submit.conftest import Command
from tests.submit.kubernetes_stand_in import kubernetes, node

OBJECTS = {"secrets/shellv-storage", "configmaps/shellv-services", "serviceaccounts/pipeline-runner"}
NAMES = ["server", "versions", "credentials", "bucket", "MLflow", "images", "GPU nodes"]


@pytest.fixture(autouse=True)
def own_places(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    monkeypatch.setattr(doctor, "LOCK_PATH", tmp_path / "images.lock.yaml")


def lock(path: Path, registry: str = "registry.example/team", names: Sequence[str] = get_args(ImageName)) -> None:
    digest = "sha256:" + "a" * 64
    images = {name: {"reference": f"{registry}/shellv-{name}:1", "digest": digest} for name in names}
    path.write_text(yaml.safe_dump({"images": images}))


def results(command: Command, *arguments: str) -> tuple[int, dict[str, dict[str, str]]]:
    said = command("doctor", "--json", *arguments)
    return said.code, {each["name"]: each for each in json.loads(said.out)}


def test_a_cluster_that_has_everything(
    kfp: KfpServer,
    command: Command,
    bucket_uri: str,
    tracking_store: Path,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tracking_store}")
    lock(tmp_path / "images.lock.yaml")
    nodes = [
        node("cpu"),
        node("a", 8, "NVIDIA-A100-SXM4-80GB"),
        node("b", 8, "NVIDIA-A100-SXM4-80GB"),
        node("c", 4),
        node("broken", 8, "NVIDIA-H100", ready=False),
        node("away", 8, "NVIDIA-H100", cordoned=True),
    ]
    with kubernetes(nodes, OBJECTS, tmp_path / "kubeconfig"):
        said = command("doctor", "--root-uri", bucket_uri)
        code, found = results(command, "--root-uri", bucket_uri)
    assert said.code == code == 0, said.out
    assert {each["status"] for each in found.values()} == {"ok"}
    assert list(found) == [*NAMES, "secret", "config map", "service account"]
    assert found["GPU nodes"]["detail"] == "3 nodes: 16 x NVIDIA-A100-SXM4-80GB, 4 x unknown model"
    assert found["versions"]["detail"] == "client 2.17.0, server 2.17.0"
    assert found["credentials"]["detail"] == "token of KF_PIPELINES_TOKEN: runs can be listed"
    assert "what to do" not in said.out
    assert [line.split("  ")[0] for line in said.out.splitlines()] == ["check", *found]
    assert list_uris(bucket_uri) == []


def test_what_is_out_of_reach_is_not_checked_and_no_failure(command: Command) -> None:
    code, found = results(command)
    assert code == 0
    assert {each["status"] for each in found.values()} == {"not checked"}
    assert all(each["remedy"] for each in found.values())
    assert list(found) == [name for name in NAMES if name not in ("versions", "credentials")]


def test_each_fault_is_found_and_says_what_to_do(
    kfp: KfpServer,
    command: Command,
    bucket_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    lock(tmp_path / "images.lock.yaml", registry="localhost")
    kfp.version = "2.5.0"
    kfp.fail("GET", "/runs", 403)
    with kubernetes([node("cpu")], set(), tmp_path / "kubeconfig"):
        code, found = results(command, "--root-uri", "s3://no-such-bucket/prefix")
    assert code == 1
    assert found.pop("server")["status"] == "ok"
    assert {each["status"] for each in found.values()} == {"failed"}
    assert "bring the server to 2.17.0" in found["versions"]["remedy"]
    assert "refuses this user (403" in found["credentials"]["detail"]
    assert "does not exist" in found["bucket"]["detail"]
    assert "does not answer" in found["MLflow"]["detail"]
    assert "push them" in found["images"]["remedy"]
    assert "device plugin" in found["GPU nodes"]["remedy"]
    assert "kubectl apply -k" in found["secret"]["remedy"]


def test_a_server_that_is_down_fails_and_the_rest_is_checked(
    command: Command, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock(tmp_path / "images.lock.yaml", names=["control"])
    with kubernetes(None, OBJECTS, tmp_path / "kubeconfig"):
        said = command("doctor", "--endpoint", "http://127.0.0.1:9", "--root-uri", "file:///data")
        code, found = results(command, "--endpoint", "http://127.0.0.1:9", "--root-uri", "file:///data")
    assert said.code == code == 1
    assert found["server"]["status"] == "failed"
    assert found["bucket"]["detail"] == "file:///data is a place on one machine"
    assert "lacks train, serve" in found["images"]["detail"]
    assert found["GPU nodes"]["status"] == "not checked"
    assert "Kubernetes answers 403" in found["GPU nodes"]["detail"]
    assert found["secret"]["status"] == "ok"
    assert "what to do:" in said.out


@pytest.mark.parametrize("version", ["unknown", ""])
def test_a_server_that_does_not_tell_its_version(kfp: KfpServer, command: Command, version: str) -> None:
    kfp.version = version
    assert results(command)[1]["versions"]["status"] == "not checked"
    kfp.fail("GET", "/apis/v1beta1/healthz", 404)
    assert results(command)[1]["versions"]["status"] == "not checked"


@pytest.mark.parametrize(
    ("version", "expected"), [("2.17.3", "ok"), ("2.18.0", "ok"), ("v2.16.1", "failed"), ("3.0.0", "failed")]
)
def test_which_server_fits(kfp: KfpServer, command: Command, version: str, expected: str) -> None:
    kfp.version = version
    assert results(command)[1]["versions"]["status"] == expected


def test_the_probe_leaves_nothing_behind(store_uri: str) -> None:
    probe(store_uri)
    assert list_uris(store_uri) == []


def test_the_probe_uploads_in_parts(bucket_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(S3Store, "delete", lambda store, uri: None)
    probe(bucket_uri)
    (left,) = list_uris(bucket_uri)
    # S3 marks what came in parts so.
    assert status(left).version.endswith("-2")
