"""Objects behind ``s3://bucket/key`` and ``file:///path`` URIs, with one set of errors for both.

Writes are atomic: a reader sees the old bytes, the new bytes or nothing. Knows nothing of manifests or stages.
"""

from __future__ import annotations

import contextlib
import errno
import functools
import os
import random
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from shellv_core.errors import (
    BucketNotFoundError,
    ConfigError,
    DiskFullError,
    ObjectNotFoundError,
    StorageAccessError,
    StorageError,
    StorageUnreachableError,
)

READ_ATTEMPTS = 7
READ_TIMEOUT_SECONDS = 20.0  # without a byte
FIRST_DELAY_SECONDS = 0.05
TRANSIENT_STATUSES = (429, 500, 502, 503, 504)
MAX_CONNECTIONS = 32


def _ignore(count: int) -> None:
    """Take no notice of retries."""


@dataclass(frozen=True)
class ObjectStatus:
    """Size of an object, and a text that changes when its content does (ETag, or size and modification time)."""

    bytes: int
    version: str


class Store(Protocol):
    """What a storage back-end offers; all paths are full URIs, all errors of the `StorageError` tree."""

    def check(self, uri: str) -> None:
        """Raise within seconds if the place of `uri` cannot be used."""

    def read_bytes(self, uri: str) -> bytes:
        """All bytes of an object."""

    def read_range(self, uri: str, offset: int, size: int, on_retry: Callable[[int], None] = ...) -> bytes:
        """`size` bytes of an object from `offset`; fewer where it ends before.

        Args:
            on_retry: called with how many more requests it took than one, if any.
        """

    def write_bytes(self, uri: str, data: bytes) -> None:
        """Write an object; readers see all of it or nothing."""

    def upload(self, path: Path, uri: str) -> None:
        """Write a local file as an object."""

    def download(self, uri: str, path: Path) -> None:
        """Write an object as a local file."""

    def exists(self, uri: str) -> bool:
        """Whether there is an object at `uri`."""

    def status(self, uri: str) -> ObjectStatus:
        """Size and version of an object."""

    def list_uris(self, prefix_uri: str, limit: int | None = None) -> list[str]:
        """Addresses of all objects below `prefix_uri`, or of the first `limit`."""

    def delete(self, uri: str) -> None:
        """Delete an object; a missing one is no fault."""


def open_store(uri: str) -> Store:
    """The store that serves `uri`.

    Raises:
        ConfigError: if the scheme is neither ``s3`` nor ``file``, or the address is incomplete.
    """
    parts = urlsplit(uri)
    if parts.scheme == "s3" and parts.netloc:
        return _s3_store()
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path.startswith("/"):
        return FileStore()
    raise ConfigError(f"{uri!r} is not a storage address; use s3://BUCKET/KEY or file:///ABSOLUTE/PATH.")


def join(uri: str, *parts: str) -> str:
    """`uri` with path `parts` appended."""
    return "/".join([uri.rstrip("/"), *(part.strip("/") for part in parts)])


class FileStore:
    """Plain files; a write goes to a temporary name in the same folder and is renamed when it is on disk."""

    def check(self, uri: str) -> None:
        """Raise if no file could be written below `uri`."""
        path = _path(uri)
        while not path.exists():
            path = path.parent
        if not path.is_dir() or not os.access(path, os.W_OK | os.X_OK):
            raise StorageAccessError(f"{uri}: {path} is not a folder that this user may write to.")

    def read_bytes(self, uri: str) -> bytes:
        with _file_errors(uri):
            return _path(uri).read_bytes()

    def read_range(self, uri: str, offset: int, size: int, on_retry: Callable[[int], None] = _ignore) -> bytes:
        with _file_errors(uri), _path(uri).open("rb", buffering=0) as file:
            return os.pread(file.fileno(), size, offset)

    def write_bytes(self, uri: str, data: bytes) -> None:
        with _file_errors(uri), _replacing(_path(uri)) as temporary:
            temporary.write_bytes(data)

    def upload(self, path: Path, uri: str) -> None:
        with _file_errors(uri), _replacing(_path(uri)) as temporary:
            shutil.copyfile(path, temporary)

    def download(self, uri: str, path: Path) -> None:
        with _file_errors(uri), _replacing(path) as temporary:
            shutil.copyfile(_path(uri), temporary)

    def exists(self, uri: str) -> bool:
        return _path(uri).is_file()

    def status(self, uri: str) -> ObjectStatus:
        with _file_errors(uri):
            found = _path(uri).stat()
            return ObjectStatus(found.st_size, f"{found.st_size}-{found.st_mtime_ns}")

    def list_uris(self, prefix_uri: str, limit: int | None = None) -> list[str]:
        root = _path(prefix_uri)
        found = sorted(path for path in root.rglob("*") if not path.is_dir()) if root.is_dir() else []
        return [path.as_uri() for path in found[:limit]]

    def delete(self, uri: str) -> None:
        with _file_errors(uri):
            path = _path(uri)
            path.unlink(missing_ok=True)


class S3Store:
    """Any S3 service, addressed by the usual AWS_* environment variables."""

    def __init__(self) -> None:
        import boto3
        from boto3.s3.transfer import TransferConfig
        from botocore.config import Config as BotoConfig
        from botocore.exceptions import BotoCoreError

        def client(attempts: int, read_timeout: float = 60) -> Any:
            # Not boto3's default session, which keeps the first credentials that it finds for the process's life.
            session = boto3.session.Session()
            return session.client(
                "s3",
                region_name=os.environ.get("AWS_REGION") or os.environ.get("AWS_DEFAULT_REGION") or "us-east-1",
                config=BotoConfig(
                    connect_timeout=3,
                    read_timeout=read_timeout,
                    max_pool_connections=MAX_CONNECTIONS,
                    retries={"mode": "standard", "total_max_attempts": attempts},
                    s3={"addressing_style": "path" if self.endpoint else "auto"},
                ),
            )

        self.endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")
        try:
            self._impatient_client = client(attempts=2)
            self._client = client(attempts=6)
            self._reading_client = client(1, READ_TIMEOUT_SECONDS)  # `_read` has its own retries
        except (BotoCoreError, ValueError) as error:
            raise StorageAccessError(
                f"the S3 settings cannot be used: {error}. Check AWS_PROFILE and AWS_ENDPOINT_URL."
            ) from None
        self._transfer = TransferConfig(multipart_threshold=64 << 20, multipart_chunksize=16 << 20, max_concurrency=4)

    def check(self, uri: str) -> None:
        """Raise within seconds if the bucket of `uri` cannot be reached, is missing or is not ours."""
        with self._errors(uri):
            self._impatient_client.head_bucket(Bucket=_bucket(uri))

    def read_bytes(self, uri: str) -> bytes:
        return self._read(uri, _ignore)

    def read_range(self, uri: str, offset: int, size: int, on_retry: Callable[[int], None] = _ignore) -> bytes:
        return self._read(uri, on_retry, Range=f"bytes={offset}-{offset + size - 1}") if size else b""

    def _read(self, uri: str, on_retry: Callable[[int], None], **options: str) -> bytes:
        """Get an object or a part of it.

        One loop for refused requests and for answers that break off, which botocore's own retries do not cover.
        """
        from botocore import exceptions as boto

        with self._errors(uri):
            for attempt in range(1, READ_ATTEMPTS + 1):
                try:
                    response = self._reading_client.get_object(Bucket=_bucket(uri), Key=_key(uri), **options)
                    data: bytes = response["Body"].read()
                    return data
                except (
                    boto.ConnectionError,
                    boto.HTTPClientError,
                    boto.IncompleteReadError,
                    boto.ClientError,
                ) as error:
                    if isinstance(error, boto.ClientError):
                        status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
                        if status == 416:
                            return b""  # the range begins behind the object's end
                        if status not in TRANSIENT_STATUSES:
                            raise
                    if attempt == READ_ATTEMPTS:
                        raise
                on_retry(1)
                time.sleep(min(FIRST_DELAY_SECONDS * 2**attempt, 5) * random.uniform(0.5, 1))
        raise AssertionError("the last attempt returns or raises")

    def write_bytes(self, uri: str, data: bytes) -> None:
        with self._errors(uri):
            self._client.put_object(Bucket=_bucket(uri), Key=_key(uri), Body=data)

    def upload(self, path: Path, uri: str) -> None:
        with self._errors(uri):
            self._client.upload_file(str(path), _bucket(uri), _key(uri), Config=self._transfer)

    def download(self, uri: str, path: Path) -> None:
        # Inside out, as some of botocore's errors are OSErrors.
        with _file_errors(path.as_uri()), _replacing(path) as temporary, self._errors(uri):
            # boto3 repeats the parts whose body broke off by itself.
            self._client.download_file(_bucket(uri), _key(uri), str(temporary), Config=self._transfer)

    def exists(self, uri: str) -> bool:
        try:
            with self._errors(uri):
                self._client.head_object(Bucket=_bucket(uri), Key=_key(uri))
        except ObjectNotFoundError:
            return False
        return True

    def status(self, uri: str) -> ObjectStatus:
        with self._errors(uri):
            found = self._client.head_object(Bucket=_bucket(uri), Key=_key(uri))
            return ObjectStatus(found["ContentLength"], found["ETag"].strip('"'))

    def list_uris(self, prefix_uri: str, limit: int | None = None) -> list[str]:
        bucket, prefix = _bucket(prefix_uri), _key(prefix_uri).rstrip("/") + "/"
        with self._errors(prefix_uri):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=bucket, Prefix=prefix.lstrip("/"), PaginationConfig={"MaxItems": limit}
            )
            return [f"s3://{bucket}/{item['Key']}" for page in pages for item in page.get("Contents", [])]

    def delete(self, uri: str) -> None:
        with self._errors(uri):
            self._client.delete_object(Bucket=_bucket(uri), Key=_key(uri))

    @contextlib.contextmanager
    def _errors(self, uri: str) -> Iterator[None]:
        from boto3.exceptions import Boto3Error, RetriesExceededError, S3UploadFailedError
        from botocore import exceptions as boto

        where = f"{uri} at {self.endpoint or 'the AWS endpoint'}"
        try:
            yield
        except (boto.NoCredentialsError, boto.PartialCredentialsError, boto.TokenRetrievalError) as error:
            raise StorageAccessError(
                f"{where}: no usable S3 credentials ({error}). Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY,"
                " or use a file:// address."
            ) from None
        except (boto.IncompleteReadError, boto.ResponseStreamingError, RetriesExceededError) as error:
            raise StorageUnreachableError(
                f"{where}: the answer broke off at every try ({error}). Check the network and that the S3"
                " service is well, then rerun."
            ) from None
        except (boto.ConnectionError, boto.HTTPClientError) as error:
            raise StorageUnreachableError(
                f"{where}: the S3 service does not answer ({error}). Check AWS_ENDPOINT_URL and that it is running."
            ) from None
        except boto.ClientError as error:
            raise _client_error(where, uri, error) from None
        except S3UploadFailedError as error:
            raise StorageError(f"{where}: upload failed: {error}") from None
        except (boto.BotoCoreError, Boto3Error) as error:
            raise StorageError(f"{where}: {error}") from None


@functools.cache
def _s3_store_for(environment: tuple[str | None, ...]) -> S3Store:
    return S3Store()


def _s3_store() -> S3Store:
    names = ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE")
    return _s3_store_for(tuple(os.environ.get(name) for name in names))


def _client_error(where: str, uri: str, error: Any) -> StorageError:
    code = str(error.response.get("Error", {}).get("Code", ""))
    status = error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")
    if code == "NoSuchBucket" or (status == 404 and error.operation_name == "HeadBucket"):
        return BucketNotFoundError(f"{where}: the bucket {_bucket(uri)!r} does not exist. Create it or name another.")
    if status == 404:
        return ObjectNotFoundError(f"{where}: no such object.")
    if status in (401, 403):
        return StorageAccessError(
            f"{where}: access denied ({code}). Check AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY and the bucket's policy."
        )
    if code in ("InsufficientCapacity", "XMinioStorageFull") or status == 507:
        return DiskFullError(f"{where}: the service has no space left ({code}).")
    if status in TRANSIENT_STATUSES:
        return StorageUnreachableError(
            f"{where}: the S3 service is overloaded or failing ({status} {code}) and was so at every retry. Look at its"
            " log, or rerun with less load."
        )
    if code in ("NotImplemented", "InvalidArgument", "XAmzContentSHA256Mismatch"):
        hint = "A service that knows no checksums of uploads needs AWS_REQUEST_CHECKSUM_CALCULATION=when_required."
        return StorageError(f"{where}: {error}. {hint}")
    return StorageError(f"{where}: {error}")


def _bucket(uri: str) -> str:
    return urlsplit(uri).netloc


def _key(uri: str) -> str:
    # Not urlsplit: a key may hold '#' or '?'.
    return uri.removeprefix("s3://").partition("/")[2]


def _path(uri: str) -> Path:
    return Path(unquote(urlsplit(uri).path))


def local_path(uri: str) -> Path | None:
    """The path behind a ``file://`` address; None for any other."""
    return _path(uri) if urlsplit(uri).scheme == "file" else None


@contextlib.contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        descriptor = os.open(temporary, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


@contextlib.contextmanager
def _file_errors(uri: str) -> Iterator[None]:
    try:
        yield
    except FileNotFoundError:
        raise ObjectNotFoundError(f"{uri}: no such file.") from None
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = f"{error.strerror}".lower()
            raise DiskFullError(f"{uri}: {free}. Free some space or choose another output_uri, then rerun.") from None
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EISDIR, errno.EEXIST):
            raise StorageAccessError(f"{uri}: {error.strerror}. Choose a place that this user may write to.") from None
        raise StorageError(f"{uri}: {error}") from None
