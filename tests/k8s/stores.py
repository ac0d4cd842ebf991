"""SeaweedFS and MLflow as child processes, with the very arguments of their manifests."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.k8s.rendering import named, render

KEYS = {"AWS_ACCESS_KEY_ID": "reader", "AWS_SECRET_ACCESS_KEY": "only-for-this-test"}
START_SECONDS = 180


def free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


@contextlib.contextmanager
def object_store(folder: Path) -> Iterator[int]:
    """SeaweedFS over `folder`; yields the port of its S3 service, on all addresses."""
    (folder / "data").mkdir(parents=True)
    ports = free_ports(10)
    parts = ("master", "volume", "filer", "s3", "admin")
    command = _command("StatefulSet", "seaweedfs", {"-dir": str(folder / "data"), "-s3.port": str(ports[3])})
    # Ports inside the pod, which the manifest leaves as they are.
    command += [f"-{part}.port={port}" for part, port in zip(parts, ports[:5], strict=True) if part != "s3"]
    command += [f"-{part}.port.grpc={port}" for part, port in zip(parts, ports[5:], strict=True)]
    with _running(command, KEYS, folder, f"http://127.0.0.1:{ports[3]}/healthz"):
        yield ports[3]


@contextlib.contextmanager
def mlflow(folder: Path, store_port: int, *hosts: str) -> Iterator[int]:
    """MLflow over an SQLite file in `folder` and the object store; yields its port, on all addresses.

    Args:
        hosts: names by which it is asked, beside those of its manifest.
    """
    folder.mkdir(parents=True)
    [port] = free_ports(1)
    database = f"sqlite:///{folder / 'mlflow.db'}"
    command = _command("Deployment", "mlflow", {"--backend-store-uri": database, "--port": str(port), "--workers": "1"})
    allowed = next(number for number, each in enumerate(command) if each.startswith("--allowed-hosts="))
    command[allowed] = ",".join([command[allowed], *(f"{host}:{port}" for host in hosts)])
    services = services_at(f"http://127.0.0.1:{store_port}", "")
    with _running(command, {**KEYS, **services}, folder, f"http://127.0.0.1:{port}/health"):
        yield port


def services_at(store_url: str, mlflow_url: str) -> dict[str, str]:
    """The ConfigMap `shellv-services` for these addresses."""
    data: dict[str, str] = named(render("k8s/overlays/dev"), "ConfigMap", "shellv-services")["data"]
    urls = {"AWS_ENDPOINT_URL": store_url, "MLFLOW_S3_ENDPOINT_URL": store_url, "MLFLOW_TRACKING_URI": mlflow_url}
    assert urls.keys() < data.keys()
    return {**data, **urls}


def _command(kind: str, name: str, changes: dict[str, str]) -> list[str]:
    """Command and arguments of a manifest's container, with the values of some options replaced."""
    [container] = named(render("k8s/overlays/dev"), kind, name)["spec"]["template"]["spec"]["containers"]
    given: list[str] = [*container["command"], *container["args"]]
    for option, value in changes.items():
        [index] = [number for number, each in enumerate(given) if each.startswith(f"{option}=")]
        given[index] = f"{option}={value}"
    given[0] = str(Path(sys.executable).with_name(given[0]))
    return given


@contextlib.contextmanager
def _running(command: list[str], environment: dict[str, str], folder: Path, health_url: str) -> Iterator[None]:
    log_path = folder / "log"
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command, env={**os.environ, **environment}, cwd=folder, stdout=log, stderr=log, stdin=subprocess.DEVNULL
        )
    try:
        deadline = time.monotonic() + START_SECONDS
        while not _answers(health_url):
            if process.poll() is not None or time.monotonic() > deadline:
                pytest.fail(f"{command[0]} does not start:\n{log_path.read_text(errors='replace')[-2000:]}")
            time.sleep(0.2)
        yield
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=5):
        return True
    return False
