"""The API server and its etcd as processes, and what tests do to them that no client of the project does."""

from __future__ import annotations

import contextlib
import json
import secrets
import socket
import ssl
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cluster.train_job_crd import definition

PROGRAMS = Path(__file__).parents[3] / ".shellv" / "apiserver"
MERGE = "application/merge-patch+json"


@dataclass(frozen=True)
class Server:
    """A running API server: its address and etcd's, its one token and its certificate, and the process ids."""

    url: str
    token: str
    tls: ssl.SSLContext
    etcd: str
    processes: tuple[int, int]

    def call(self, method: str, path: str, body: Any = None, content_type: str = "application/json") -> Any:
        """One request.

        Raises:
            urllib.error.HTTPError: if the answer is no success.
        """
        headers = {"Authorization": f"Bearer {self.token}", "Content-Type": content_type}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.url}{path}", data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60, context=self.tls) as response:
            return json.load(response)

    def forget(self) -> None:
        """Let etcd forget all versions but the last ones, as it does by itself after some minutes."""
        # A version later than all objects', or a watch may still begin at the last change.
        version = self._ask_etcd("put", {"key": "eA==", "value": "eA=="})["header"]["revision"]
        self._ask_etcd("compaction", {"revision": version, "physical": True})

    def _ask_etcd(self, call: str, body: dict[str, Any]) -> Any:
        request = urllib.request.Request(f"{self.etcd}/v3/kv/{call}", json.dumps(body).encode(), method="POST")
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)


@contextlib.contextmanager
def running(folder: Path) -> Iterator[Server]:
    """A server with the TrainJob defined, its state and its log in `folder`.

    Raises:
        FileNotFoundError: if it is not built.
        RuntimeError: if it does not start.
    """
    client, peer, port = _free_ports(3)
    etcd, token = f"http://127.0.0.1:{client}", secrets.token_hex(16)
    store = [
        str(PROGRAMS / "etcd"), "--data-dir", str(folder / "etcd"), "--unsafe-no-fsync",
        "--listen-client-urls", etcd, "--advertise-client-urls", etcd,
        "--listen-peer-urls", f"http://127.0.0.1:{peer}", "--initial-advertise-peer-urls", f"http://127.0.0.1:{peer}",
        "--initial-cluster", f"default=http://127.0.0.1:{peer}",
    ]  # fmt: skip
    certificates = folder / "certificates"
    serve = [
        str(PROGRAMS / "apiserver"), "-etcd", etcd, "-port", str(port), "-token", token,
        "-certificates", str(certificates),
    ]  # fmt: skip
    with _process(store, folder / "etcd.log") as first, _process(serve, folder / "apiserver.log") as second:
        certificate = certificates / "apiserver.crt"
        _wait(certificate.exists, second, folder / "apiserver.log")
        tls = ssl.create_default_context(cafile=str(certificate))
        server = Server(f"https://127.0.0.1:{port}", token, tls, etcd, (first.pid, second.pid))
        crds = "/apis/apiextensions.k8s.io/v1/customresourcedefinitions"
        _wait(lambda: _answers(server, crds), second, folder / "apiserver.log")
        server.call("POST", crds, definition())
        group, version = definition()["spec"]["group"], definition()["spec"]["versions"][0]["name"]
        path = f"/apis/{group}/{version}/trainjobs"
        _wait(lambda: _answers(server, path), second, folder / "apiserver.log")
        yield server


@contextlib.contextmanager
def _process(arguments: list[str], log: Path) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as output:
        process = subprocess.Popen(arguments, stdout=output, stderr=subprocess.STDOUT)
    try:
        yield process
    finally:
        process.terminate()
        try:
            process.wait(15)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _answers(server: Server, path: str) -> bool:
    try:
        server.call("GET", path)
    except OSError:
        return False
    return True


def _wait(condition: Any, process: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        if process.poll() is not None or time.monotonic() > deadline:
            raise RuntimeError(f"the API server does not start: {log.read_text(errors='replace')[-2000:]}")
        time.sleep(0.02)


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [each.getsockname()[1] for each in sockets]
