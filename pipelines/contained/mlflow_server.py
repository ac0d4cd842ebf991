"""MLflow's server as a child process, for a run whose tasks share no disk."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from pathlib import Path

from shellv_core.errors import TrackingError

START_TIMEOUT_SECONDS = 300.0
STOP_TIMEOUT_SECONDS = 20.0
POLL_SECONDS = 0.5


@contextlib.contextmanager
def mlflow_server(folder: Path, address: str, bucket: str, environment: Mapping[str, str]) -> Iterator[str]:
    """Run the server, its database in `folder` and its artifacts in `bucket`, which it reaches by `environment`.

    Yields:
        its URL.

    Raises:
        TrackingError: with the log's last lines, if it does not start.
    """
    folder.mkdir(parents=True, exist_ok=True)
    log_path = folder / "mlflow.log"
    with socket.socket() as probe:
        probe.bind((address, 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "mlflow", "server", f"--host={address}", f"--port={port}", "--workers=1"]
    command += [f"--backend-store-uri=sqlite:///{folder / 'mlflow.db'}", f"--allowed-hosts={address}:{port}"]
    command += [f"--artifacts-destination=s3://{bucket}/mlflow"]
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_"))}
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            env={**kept, **environment, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )
    url = f"http://{address}:{port}"
    try:
        _wait_until_healthy(url, process, log_path)
        yield url
    finally:
        _stop(process)


def _wait_until_healthy(url: str, process: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while True:
        with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):  # noqa: S310 - our own
            return
        if process.poll() is not None or time.monotonic() > deadline:
            tail = "\n".join(log_path.read_text(encoding="utf-8", errors="replace").splitlines()[-10:])
            raise TrackingError(f"MLflow's server does not start; its log ({log_path}) ends:\n{tail}")
        time.sleep(POLL_SECONDS)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the server with its workers, which are of its session."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_TIMEOUT_SECONDS)
            return
