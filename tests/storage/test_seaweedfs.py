from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shellv_core import storage
from shellv_core.errors import StorageError
from shellv_core.storage.seaweedfs import EmbeddedS3, embedded_s3


def pid_of(folder: Path) -> int:
    return int(json.loads((folder / "server.json").read_text())["pid"])


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return b") Z " not in Path(f"/proc/{pid}/stat").read_bytes()


def test_data_survive_a_restart_and_the_server_goes_with_its_owner(tmp_path: Path) -> None:
    folder = tmp_path / "s3"
    before = os.environ.get("AWS_ENDPOINT_URL")
    with embedded_s3(folder) as bucket:
        pid = pid_of(folder)
        storage.write_bytes(f"s3://{bucket}/kept", b"bytes")
        second = EmbeddedS3(folder)
        second.start()
        second.stop()
        assert alive(pid), "a process that only attached must not stop the server"
    assert not alive(pid)
    assert os.environ.get("AWS_ENDPOINT_URL") == before
    assert stat.S_IMODE((folder / "credentials.json").stat().st_mode) == 0o600
    with embedded_s3(folder) as bucket:
        assert storage.read_bytes(f"s3://{bucket}/kept") == b"bytes"


def test_the_server_listens_where_it_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "s3"
    with embedded_s3(folder) as bucket:
        storage.write_bytes(f"s3://{bucket}/kept", b"bytes")
        with pytest.raises(StorageError, match=r"listens at http://127\.0\.0\.1:\d+, but 127\.0\.0\.2 is needed"):
            EmbeddedS3(folder, "127.0.0.2").start()
    with embedded_s3(folder, "127.0.0.2") as bucket:
        assert os.environ["AWS_ENDPOINT_URL"].startswith("http://127.0.0.2:")
        assert storage.read_bytes(f"s3://{bucket}/kept") == b"bytes"


def test_the_server_of_a_killed_owner_is_taken_over(tmp_path: Path) -> None:
    folder = tmp_path / "s3"
    program = (
        "import sys, time, pathlib\n"
        "from shellv_core.storage.seaweedfs import EmbeddedS3\n"
        "EmbeddedS3(pathlib.Path(sys.argv[1])).start()\n"
        "print('up', flush=True)\n"
        "time.sleep(600)\n"
    )
    owner = subprocess.Popen([sys.executable, "-c", program, str(folder)], stdout=subprocess.PIPE)
    assert owner.stdout is not None
    assert owner.stdout.readline() == b"up\n"
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    pid = pid_of(folder)
    assert alive(pid)
    with embedded_s3(folder):
        assert pid_of(folder) == pid
    deadline = time.monotonic() + 10
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(pid)


def test_a_killed_server_is_replaced(tmp_path: Path) -> None:
    folder = tmp_path / "s3"
    with embedded_s3(folder) as bucket:
        storage.write_bytes(f"s3://{bucket}/kept", b"bytes")
        os.kill(pid_of(folder), signal.SIGKILL)
    with embedded_s3(folder) as bucket:
        assert storage.read_bytes(f"s3://{bucket}/kept") == b"bytes"


def test_no_secret_reaches_the_log_or_the_command_line(tmp_path: Path) -> None:
    folder = tmp_path / "s3"
    with embedded_s3(folder):
        secret = json.loads((folder / "credentials.json").read_text())["secret_access_key"]
        assert secret not in (folder / "server.log").read_text(errors="replace")
        assert secret.encode() not in Path(f"/proc/{pid_of(folder)}/cmdline").read_bytes()
