"""Committed output folders: files first, ``manifest.json`` last.

A folder without ``manifest.json`` was never finished. While it is being written it holds ``_in_progress.json`` with
the fingerprint of the run that owns it, so that the same run may continue there and another is refused.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shellv_core.config import Config, build_config, fingerprint
from shellv_core.errors import (
    ConfigError,
    IntegrityError,
    ObjectNotFoundError,
    OutputNotEmptyError,
)
from shellv_core.storage.home import home
from shellv_core.storage.stores import join, local_path, open_store

MANIFEST_NAME = "manifest.json"
MARKER_NAME = "_in_progress.json"
_REQUESTS_AT_ONCE = 16


class FileEntry(Config):
    """One file of a committed folder; `name` is relative to the folder, `sha256` in hex."""

    name: str
    bytes: int
    sha256: str


class InputReference(Config):
    """The exact input that a stage read."""

    uri: str
    content_sha256: str


class Manifest(Config):
    """What a stage made, from what, and how; its presence is the commit point.

    Attributes:
        origin: where it was made: commit, image, workflow run, tracked run, as far as they are known.
    """

    stage: str
    fingerprint: str
    library_version: str
    config: dict[str, Any]
    versions: dict[str, str] = {}
    origin: dict[str, str] = {}
    inputs: dict[str, InputReference] = {}
    files: list[FileEntry] = []
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}


class Group(Config):
    """Files that were put into an unfinished folder together, all of them or none.

    Attributes:
        name: of the group.
        files: those that the commit keeps.
        scratch: those that the commit removes: what a later step of the same run needs.
        note: what the run wants to remember of them.
    """

    name: str
    files: list[FileEntry] = []
    scratch: list[FileEntry] = []
    note: dict[str, Any] = {}


class OutputDirectory:
    """A folder that one run writes and commits; several processes or machines may write parts of it.

    Args:
        uri: where the folder goes (``s3://`` or ``file://``).
        fingerprint: identity of the run; only a run with the same one may continue or reuse the folder.
    """

    def __init__(self, uri: str, fingerprint: str) -> None:
        self.uri, self.fingerprint = uri.rstrip("/"), fingerprint
        self._store = open_store(uri)
        self._groups: dict[str, Group] = {}

    def finished(self) -> Manifest | None:
        """The manifest, where this very run was committed here before; None where nothing is committed.

        Raises:
            OutputNotEmptyError: if another run was committed here.
        """
        if not self._store.exists(self._at(MANIFEST_NAME)):
            return None
        manifest = read_manifest(self.uri)
        if manifest.fingerprint != self.fingerprint:
            raise OutputNotEmptyError(
                f"{self.uri} holds the output of {manifest.stage!r} with other settings or inputs"
                f" (fingerprint {manifest.fingerprint[:12]}, this run has {self.fingerprint[:12]})."
                " Choose another output_uri or delete the folder."
            )
        if self._store.exists(self._at(MARKER_NAME)):
            self._sweep(manifest)
        return manifest

    def begin(self, replace: bool = False) -> None:
        """Take the folder, or continue in it if an earlier try of this run was cut off.

        Args:
            replace: whether an output that this very run committed before gives way.

        Raises:
            OutputNotEmptyError: if the folder holds anything that this run did not write.
        """
        try:
            marker = json.loads(self._store.read_bytes(self._at(MARKER_NAME)))
        except ObjectNotFoundError:
            if replace:
                delete_prefix(self.uri)
            found = self._store.list_uris(self.uri, limit=1)
            if found:
                raise OutputNotEmptyError(
                    f"{self.uri} is not empty: it holds {found[0].rpartition('/')[2]!r}, which this run did not write."
                    " Choose another output_uri or delete the folder."
                ) from None
            self._store.write_bytes(self._at(MARKER_NAME), json.dumps({"fingerprint": self.fingerprint}).encode())
            return
        if marker.get("fingerprint") != self.fingerprint:
            raise OutputNotEmptyError(
                f"{self.uri} holds the unfinished output of another run (fingerprint"
                f" {str(marker.get('fingerprint'))[:12]}, this run has {self.fingerprint[:12]})."
                " Rerun that one with its settings, choose another output_uri or delete the folder."
            )
        self._groups = self._read_groups()

    def done_groups(self) -> dict[str, Group]:
        """What earlier tries of this run, or other processes of it, had put here when `begin` looked, by name."""
        return dict(self._groups)

    def done_files(self) -> dict[str, FileEntry]:
        """The files of these groups that the commit keeps, by name."""
        return {entry.name: entry for group in self._groups.values() for entry in group.files}

    def put_group(
        self,
        group: str,
        files: Mapping[str, Path],
        scratch: Mapping[str, Path] | None = None,
        note: Mapping[str, Any] | None = None,
        hashes: Mapping[str, str] | None = None,
    ) -> Group:
        """Store local files under their names, then record them as `group` in one step.

        Args:
            scratch: further files that the commit removes.
            note: JSON values to find again in `done_groups`.
            hashes: SHA-256 (hex) of files whose hash is known already.
        """
        known = hashes or {}
        kept = [self._put(path, name, known.get(name)) for name, path in files.items()]
        passing = [self._put(path, name, known.get(name)) for name, path in (scratch or {}).items()]
        return self._record(Group(name=group, files=kept, scratch=passing, note=dict(note or {})))

    def adopt(self, group: Group) -> None:
        """Count a group that another process of this run has put here."""
        self._groups[group.name] = group

    def put_file(self, path: Path, name: str) -> FileEntry:
        """Store the file at `path` as `name` and record its size and SHA-256."""
        return self.put_group(name, {name: path}).files[0]

    def put_bytes(self, data: bytes, name: str) -> FileEntry:
        """Store `data` as `name` and record its size and SHA-256."""
        entry = FileEntry(name=_checked_name(name), bytes=len(data), sha256=hashlib.sha256(data).hexdigest())
        self._store.write_bytes(self._at(name), data)
        self._record(Group(name=name, files=[entry]))
        return entry

    def put_tree(self, directory: Path, prefix: str = "") -> list[FileEntry]:
        """Store every file below `directory`, named ``prefix/relative/path``."""
        paths = sorted(path for path in directory.rglob("*") if path.is_file())
        return [
            self.put_file(path, "/".join(filter(None, [prefix.strip("/"), path.relative_to(directory).as_posix()])))
            for path in paths
        ]

    def fetch(self, entry: FileEntry, path: Path) -> None:
        """Copy a stored file of this unfinished folder to `path`.

        Raises:
            IntegrityError: if its bytes differ from `entry`.
        """
        self._store.download(self._at(entry.name), path)
        if sha256_of(path) != entry.sha256:
            raise IntegrityError(
                f"{self._at(entry.name)} differs from what was recorded of it (SHA-256 {entry.sha256[:12]}...)."
                f" It is damaged: delete {self.uri} and rerun the stage."
            )

    def commit(self, manifest: Manifest) -> Manifest:
        """Write the manifest with all recorded files, and remove the marker, the records and the scratch files."""
        entries = {entry.name: entry for group in self._groups.values() for entry in group.files}
        manifest = manifest.model_copy(update={"files": [entries[name] for name in sorted(entries)]})
        self._store.write_bytes(self._at(MANIFEST_NAME), manifest.model_dump_json(indent=1).encode())
        self._sweep(manifest)
        return manifest

    def abort(self) -> None:
        """Remove everything that this run wrote, marker included."""
        delete_prefix(self.uri)

    def _at(self, name: str) -> str:
        return join(self.uri, name)

    def _put(self, path: Path, name: str, sha256: str | None) -> FileEntry:
        entry = FileEntry(name=_checked_name(name), bytes=path.stat().st_size, sha256=sha256 or sha256_of(path))
        self._store.upload(path, self._at(name))
        return entry

    def _record(self, group: Group) -> Group:
        self._groups[group.name] = group
        name = f"_done/{hashlib.sha256(group.name.encode()).hexdigest()[:24]}.json"
        self._store.write_bytes(self._at(name), group.model_dump_json().encode())
        return group

    def _stored(self) -> dict[str, str]:
        """Addresses of everything in the folder by name."""
        root = local_path(self.uri)
        if root is None:
            return {uri.removeprefix(f"{self.uri}/"): uri for uri in self._store.list_uris(self.uri)}
        found = {uri: local_path(uri) for uri in self._store.list_uris(self.uri)}
        return {path.relative_to(root).as_posix(): uri for uri, path in found.items() if path is not None}

    def _read_groups(self) -> dict[str, Group]:
        stored = self._stored()
        records = [uri for name, uri in stored.items() if name.startswith("_done/")]
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            groups = [Group.model_validate_json(content) for content in pool.map(self._store.read_bytes, records)]
        whole = (group for group in groups if all(each.name in stored for each in [*group.files, *group.scratch]))
        return {group.name: group for group in sorted(whole, key=lambda group: group.name)}

    def _sweep(self, manifest: Manifest) -> None:
        """Remove what a commit leaves over; the marker goes last, so that a sweep that was cut off is done again."""
        kept = {MANIFEST_NAME, MARKER_NAME, *(entry.name for entry in manifest.files)}
        with ThreadPoolExecutor(_REQUESTS_AT_ONCE) as pool:
            list(pool.map(self._store.delete, [uri for name, uri in self._stored().items() if name not in kept]))
        self._store.delete(self._at(MARKER_NAME))
        _prune_empty_folders(self.uri)


class InputDirectory:
    """A committed folder, read with every byte verified.

    Raises:
        ObjectNotFoundError: if nothing was committed at `uri`.
    """

    def __init__(self, uri: str) -> None:
        self.uri = uri.rstrip("/")
        self.manifest = read_manifest(self.uri)
        # Over the files alone: the same content made again at another time or place is the same input.
        self.content_sha256 = fingerprint([(entry.name, entry.sha256) for entry in self.manifest.files])

    def files(self, prefix: str = "") -> list[FileEntry]:
        """The entries whose names begin with `prefix`."""
        return [entry for entry in self.manifest.files if entry.name.startswith(prefix)]

    def fetch(self, name: str) -> Path:
        """A local, verified copy of file `name`, kept below the project folder's cache.

        Raises:
            ObjectNotFoundError: if the manifest does not list `name`.
            IntegrityError: if the stored bytes differ from the manifest.
        """
        entry = next((entry for entry in self.manifest.files if entry.name == name), None)
        if entry is None:
            count = len(self.manifest.files)
            raise ObjectNotFoundError(f"{self.uri} has no file {name!r}; its manifest lists {count} others.")
        path = self._cache() / name
        if path.is_file() and path.stat().st_size == entry.bytes and sha256_of(path) == entry.sha256:
            return path
        open_store(self.uri).download(join(self.uri, name), path)
        if sha256_of(path) != entry.sha256:
            path.unlink()
            raise IntegrityError(
                f"{join(self.uri, name)} differs from its manifest (expected SHA-256 {entry.sha256[:12]}...,"
                f" {entry.bytes} bytes). It is damaged: delete {self.uri} and rerun the stage that made it."
            )
        return path

    def fetch_tree(self, prefix: str) -> Path:
        """A local folder with every file below `prefix`, verified.

        Raises:
            ObjectNotFoundError: if there is none.
        """
        entries = self.files(prefix.rstrip("/") + "/")
        if not entries:
            raise ObjectNotFoundError(f"{self.uri} has no files below {prefix!r}.")
        for entry in entries:
            self.fetch(entry.name)
        return self._cache() / prefix.rstrip("/")

    def reference(self) -> InputReference:
        """What a manifest records of this input."""
        return InputReference(uri=self.uri, content_sha256=self.content_sha256)

    def _cache(self) -> Path:
        return home() / "cache" / "inputs" / self.content_sha256


def read_manifest(uri: str) -> Manifest:
    """The manifest committed at `uri`.

    Raises:
        ObjectNotFoundError: if nothing was committed there.
        IntegrityError: if it is not a manifest of this project.
    """
    try:
        data = open_store(uri).read_bytes(join(uri, MANIFEST_NAME))
    except ObjectNotFoundError:
        raise ObjectNotFoundError(
            f"{uri} holds no finished output (no {MANIFEST_NAME}). Check the address, or run the stage that makes it."
        ) from None
    try:
        return build_config(Manifest, json.loads(data))
    except (ValueError, ConfigError) as error:
        raise IntegrityError(f"{join(uri, MANIFEST_NAME)} is not a manifest of this project: {error}") from None


def delete_prefix(uri: str) -> None:
    """Delete every object below `uri`, and the folder itself on a file system."""
    store = open_store(uri)
    for found in store.list_uris(uri):
        store.delete(found)
    _prune_empty_folders(uri, keep_root=False)


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _checked_name(name: str) -> str:
    if name.startswith(("/", "_")) or ".." in name.split("/") or name == MANIFEST_NAME:
        raise ValueError(f"{name!r} cannot name an output file")
    return name


def _prune_empty_folders(uri: str, keep_root: bool = True) -> None:
    root = local_path(uri)
    if root is None or not root.is_dir():
        return
    folders = sorted((path for path in root.rglob("*") if path.is_dir()), reverse=True)
    for folder in folders:
        if not any(folder.iterdir()):
            folder.rmdir()
    if not keep_root and not any(root.iterdir()):
        shutil.rmtree(root)
