"""A server as a child process that does not outlive its parent unless it is meant to."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shellv_core.endpoint.client import EndpointClient, EndpointError, endpoint_url
from shellv_core.errors import ServingError
from shellv_core.logs import get_logger

logger = get_logger(__name__)

POLL_SECONDS = 0.2
STOP_SECONDS = 40.0
TAIL_LINES = 15


@dataclass(frozen=True)
class LocalServer:
    """A server that answers: its process id and where it is reached, for example ``http://127.0.0.1:8000``."""

    pid: int
    url: str


@contextlib.contextmanager
def local_server(
    model: str, host: str, port: int, log_path: Path, startup_timeout_seconds: float, keep_running: bool = False
) -> Iterator[LocalServer]:
    """Run ``shellv serve`` while the context is open, and after it only with `keep_running` and no error.

    The chat page is there only in a server that is kept.

    Args:
        model: a reference as in `shellv_core.serving.reference`.
        port: 0 takes a free one.
        log_path: file for the server's output.

    Raises:
        ServingError: with the log's last lines, if the server ends or does not answer in time.
    """
    port = port or free_port(host)
    command = [sys.executable, "-m", "shellv_core.cli", "serve", "--model", model, "--host", host, "--port", str(port)]
    command += ["--operations-port", "0"]
    if not keep_running:
        command += ["--until-stdin-closes", "--no-ui"]
    log_path.parent.mkdir(parents=True, exist_ok=True)
    with log_path.open("wb") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL if keep_running else subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=keep_running,
        )
    client = EndpointClient(endpoint_url(host, port))
    try:
        _wait_until_ready(process, client, log_path, startup_timeout_seconds)
        yield LocalServer(process.pid, client.url)
    except BaseException:
        _stop(process)
        raise
    if not keep_running:
        _stop(process)


def _wait_until_ready(
    process: subprocess.Popen[bytes], client: EndpointClient, log_path: Path, timeout_seconds: float
) -> None:
    deadline = time.monotonic() + timeout_seconds
    while time.monotonic() < deadline:
        if process.poll() is not None:
            raise ServingError(
                f"the server ended with code {process.returncode} before it was up:\n{log_tail(log_path)}"
            )
        with contextlib.suppress(EndpointError):
            asyncio.run(client.check_readiness())
            return
        time.sleep(POLL_SECONDS)
    raise ServingError(
        f"the server at {client.url} was not ready within {timeout_seconds:g} seconds; its log ({log_path}) ends:\n"
        f"{log_tail(log_path)}\nRaise startup_timeout_seconds if the model needs longer to load."
    )


def _stop(process: subprocess.Popen[bytes]) -> None:
    if process.stdin is not None:
        process.stdin.close()
    process.terminate()
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        logger.warning("the server (process %d) has not stopped for %g seconds: killed", process.pid, STOP_SECONDS)
        process.kill()
        process.wait()


def log_tail(path: Path) -> str:
    """The last lines of a log."""
    return "\n".join(path.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:])


def free_port(host: str) -> int:
    """A port that nobody uses at this moment."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])
