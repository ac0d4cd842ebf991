from __future__ import annotations

import os
import socket
import threading
import time
from pathlib import Path

import pytest

from shellv_core import storage
from shellv_core.errors import (
    BucketNotFoundError,
    ConfigError,
    ObjectNotFoundError,
    StorageAccessError,
    StorageUnreachableError,
)


def test_objects_come_back_as_written(store_uri: str, tmp_path: Path) -> None:
    uri = storage.join(store_uri, "folder", "name with space #1?.bin") if "s3" in store_uri else f"{store_uri}/a/b.bin"
    data = os.urandom(300_000)
    assert not storage.exists(uri)
    storage.write_bytes(uri, data)
    assert storage.exists(uri)
    assert storage.read_bytes(uri) == data
    assert storage.read_range(uri, 1000, 50) == data[1000:1050]
    storage.download(uri, tmp_path / "copy")
    assert (tmp_path / "copy").read_bytes() == data
    storage.upload(tmp_path / "copy", storage.join(store_uri, "second"))
    assert len(storage.list_uris(store_uri)) == 2
    storage.delete_prefix(store_uri)
    assert storage.list_uris(store_uri) == []


def test_large_files_go_through_multipart(bucket_uri: str, tmp_path: Path) -> None:
    path = tmp_path / "large"
    path.write_bytes(os.urandom(1 << 20) * 70)
    storage.upload(path, f"{bucket_uri}/large")
    storage.download(f"{bucket_uri}/large", tmp_path / "back")
    assert storage.sha256_of(tmp_path / "back") == storage.sha256_of(path)


def test_a_missing_object_is_named(store_uri: str) -> None:
    with pytest.raises(ObjectNotFoundError, match="nothing-here"):
        storage.read_bytes(f"{store_uri}/nothing-here")


@pytest.mark.parametrize("uri", ["http://x/y", "s3://", "/plain/path", "file://host/x", ""])
def test_other_addresses_are_refused(uri: str) -> None:
    with pytest.raises(ConfigError, match=r"s3://BUCKET/KEY or file:///ABSOLUTE/PATH"):
        storage.check_access(uri)


def test_a_missing_bucket_is_named(bucket_uri: str) -> None:
    with pytest.raises(BucketNotFoundError, match="no-such-bucket"):
        storage.check_access("s3://no-such-bucket/x")
    with pytest.raises(BucketNotFoundError, match="no-such-bucket"):
        storage.write_bytes("s3://no-such-bucket/x", b"")


def test_a_wrong_secret_is_an_access_error(bucket_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong")
    with pytest.raises(StorageAccessError, match="AWS_SECRET_ACCESS_KEY"):
        storage.check_access(bucket_uri)


def test_a_dead_endpoint_is_unreachable(bucket_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StorageUnreachableError, match="AWS_ENDPOINT_URL"):
        storage.check_access(bucket_uri)


def test_one_reset_connection_is_retried(bucket_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{bucket_uri}/x", b"payload")
    with _FlakyProxy(os.environ["AWS_ENDPOINT_URL"], resets=2) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        assert storage.read_bytes(f"{bucket_uri}/x") == b"payload"
        assert proxy.connections >= 3


class _FlakyProxy:
    """Forwards to the S3 server, but resets the first connections."""

    def __init__(self, target: str, resets: int) -> None:
        self._target = ("127.0.0.1", int(target.rsplit(":", 1)[1]))
        self._resets, self.connections = resets, 0
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"

    def __enter__(self) -> _FlakyProxy:
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            self.connections += 1
            if self.connections <= self._resets:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
                client.close()
                continue
            server = socket.create_connection(self._target)
            for source, sink in ((client, server), (server, client)):
                threading.Thread(target=_pump, args=(source, sink), daemon=True).start()


def _pump(source: socket.socket, sink: socket.socket) -> None:
    try:
        while data := source.recv(65536):
            sink.sendall(data)
    except OSError:
        pass
    finally:
        time.sleep(0.01)
        sink.close()


def test_a_version_follows_the_content(store_uri: str) -> None:
    storage.write_bytes(f"{store_uri}/a", b"one")
    first = storage.status(f"{store_uri}/a")
    assert (first.bytes, first) == (3, storage.status(f"{store_uri}/a"))
    storage.write_bytes(f"{store_uri}/a", b"two!")
    assert storage.status(f"{store_uri}/a").bytes == 4
    assert storage.status(f"{store_uri}/a").version != first.version
    with pytest.raises(ObjectNotFoundError):
        storage.status(f"{store_uri}/none")


def test_the_service_checks_what_is_uploaded(bucket_uri: str, tmp_path: Path) -> None:
    import boto3

    (tmp_path / "file").write_bytes(b"file")
    storage.write_bytes(f"{bucket_uri}/bytes", b"bytes")
    storage.upload(tmp_path / "file", f"{bucket_uri}/file")
    bucket, _, prefix = bucket_uri.removeprefix("s3://").partition("/")
    client = boto3.client("s3", region_name="us-east-1")
    for name in ("bytes", "file"):
        head = client.head_object(Bucket=bucket, Key=f"{prefix}/{name}", ChecksumMode="ENABLED")
        assert head["ChecksumCRC32"], name
