"""Objects and committed folders on ``s3://`` or ``file://``.

Knows nothing of images, models or stages. Any S3 service is addressed by the usual AWS_* environment variables;
`seaweedfs` starts one of the project's own.
"""

from __future__ import annotations

from pathlib import Path

from shellv_core.storage.directories import (
    FileEntry,
    Group,
    InputDirectory,
    InputReference,
    Manifest,
    OutputDirectory,
    delete_prefix,
    read_manifest,
    sha256_of,
)
from shellv_core.storage.home import home
from shellv_core.storage.probe import probe
from shellv_core.storage.stores import ObjectStatus, join, local_path, open_store

__all__ = [
    "FileEntry",
    "Group",
    "InputDirectory",
    "InputReference",
    "Manifest",
    "ObjectStatus",
    "OutputDirectory",
    "check_access",
    "delete_prefix",
    "download",
    "exists",
    "home",
    "join",
    "list_uris",
    "local_path",
    "open_store",
    "probe",
    "read_bytes",
    "read_manifest",
    "read_range",
    "sha256_of",
    "status",
    "upload",
    "write_bytes",
]


def check_access(uri: str) -> None:
    """Raise a `StorageError` within seconds if the place of `uri` cannot be used."""
    open_store(uri).check(uri)


def read_bytes(uri: str) -> bytes:
    """All bytes of an object."""
    return open_store(uri).read_bytes(uri)


def read_range(uri: str, offset: int, size: int) -> bytes:
    """`size` bytes of an object from `offset`; fewer where it ends before."""
    return open_store(uri).read_range(uri, offset, size)


def write_bytes(uri: str, data: bytes) -> None:
    """Write an object; readers see all of it or nothing."""
    open_store(uri).write_bytes(uri, data)


def upload(path: Path, uri: str) -> None:
    """Write a local file as an object."""
    open_store(uri).upload(path, uri)


def download(uri: str, path: Path) -> None:
    """Write an object as a local file."""
    open_store(uri).download(uri, path)


def exists(uri: str) -> bool:
    """Whether there is an object at `uri`."""
    return open_store(uri).exists(uri)


def status(uri: str) -> ObjectStatus:
    """Size and version of an object."""
    return open_store(uri).status(uri)


def list_uris(prefix_uri: str) -> list[str]:
    """The addresses of all objects below `prefix_uri`."""
    return open_store(prefix_uri).list_uris(prefix_uri)
