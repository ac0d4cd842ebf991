"""SeaweedFS and MLflow, started for real with the very arguments of their manifests."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from shellv_core.storage.seaweedfs import _free_ports
from tests.k8s.rendering import named, render

KEYS = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "only-for-this-test"}


def arguments(kind: str, name: str, changes: dict[str, str]) -> list[str]:
    """Command and arguments of a manifest's container, with the values of some options replaced."""
    [container] = named(render("k8s/overlays/dev"), kind, name)["spec"]["template"]["spec"]["containers"]
    given = [*container["command"], *container["args"]]
    for option, value in changes.items():
        [index] = [number for number, each in enumerate(given) if each.startswith(f"{option}=")]
        given[index] = f"{option}={value}"
    given[0] = str(Path(sys.executable).with_name(given[0]))
    return given


@contextlib.contextmanager
def running(command: list[str], environment: dict[str, str], folder: Path) -> Iterator[subprocess.Popen[bytes]]:
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_for(url: str, process: subprocess.Popen[bytes], log: Path) -> None:
    import time

    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
            return
        time.sleep(0.2)
    pytest.fail(f"{url} does not answer:\n{log.read_text(errors='replace')[-2000:]}")


def status(url: str, host: str) -> int:
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers={"Host": host}), timeout=30) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code


@pytest.fixture
def object_store(tmp_path: Path) -> Iterator[str]:
    """The address of SeaweedFS, in a folder of its own and at free ports."""
    folder = tmp_path / "seaweedfs"
    (folder / "data").mkdir(parents=True)
    ports = _free_ports(10)
    parts = ("master", "volume", "filer", "s3", "admin")
    command = arguments("StatefulSet", "seaweedfs", {"-dir": str(folder / "data"), "-s3.port": str(ports[3])})
    # Ports inside the pod, which the manifest leaves as they are.
    command += [f"-{part}.port={port}" for part, port in zip(parts, ports[:5], strict=True) if part != "s3"]
    command += [f"-{part}.port.grpc={port}" for part, port in zip(parts, ports[5:], strict=True)]
    with running(command, KEYS, folder) as process:
        url = f"http://127.0.0.1:{ports[3]}"
        wait_for(f"{url}/healthz", process, folder / "log")
        yield url


@pytest.mark.slow
def test_mlflow_keeps_artifacts_in_the_object_store(object_store: str, tmp_path: Path, monkeypatch: Any) -> None:
    from mlflow.tracking import MlflowClient

    from shellv_core.storage import read_bytes, write_bytes

    folder = tmp_path / "mlflow"
    folder.mkdir()
    [port] = _free_ports(1)
    database = f"sqlite:///{folder / 'mlflow.db'}"
    changes = {"--backend-store-uri": database, "--port": str(port), "--workers": "1", "--host": "127.0.0.1"}
    services = {"MLFLOW_S3_ENDPOINT_URL": object_store, "AWS_REGION": "us-east-1", "AWS_ENDPOINT_URL": object_store}
    command = arguments("Deployment", "mlflow", changes)
    hosts = next(each for each in command if each.startswith("--allowed-hosts"))
    command[command.index(hosts)] = f"{hosts},127.0.0.1:{port}"
    with running(command, {**KEYS, **services, "_MLFLOW_SGI_NAME": ""}, folder) as process:
        url = f"http://127.0.0.1:{port}"
        wait_for(f"{url}/health", process, folder / "log")

        search = f"{url}/api/2.0/mlflow/experiments/search?max_results=1"
        assert status(f"{url}/health", "10.1.2.3:5000") == 200  # the kubelet's probe
        assert status(search, "mlflow.shellv.svc.cluster.local:5000") == 200
        assert status(search, "rebound.example.com") == 403

        client = MlflowClient(url)
        run = client.create_run(client.create_experiment("stores"))
        (folder / "note.txt").write_text("kept")
        client.log_artifact(run.info.run_id, str(folder / "note.txt"))
        key = f"s3://shellv/mlflow/{run.info.experiment_id}/{run.info.run_id}/artifacts/note.txt"
        for name, value in {**KEYS, **services}.items():
            monkeypatch.setenv(name, value)
        assert read_bytes(key) == b"kept"
        # Both readers of one bucket, as pipeline and MLflow are in the cluster.
        write_bytes("s3://shellv/pipelines/x", b"y")
        assert read_bytes("s3://shellv/pipelines/x") == b"y"


def test_the_object_store_refuses_strangers(object_store: str) -> None:
    assert status(f"{object_store}/shellv/x", "seaweedfs.shellv.svc.cluster.local:8333") == 403
