"""Checkpoints of a training run: written in the background, committed in one step, kept by count.

    DIRECTORY/step-120/manifest.json   sizes and SHA-256 of the others; written last
                      /meta.json       step, the run's identity, and where its data stands
                      /...             the state: state.safetensors, or what an engine wrote
    DIRECTORY/latest.json              names the newest

The same again below an address, if one is given, so that a run whose machine was lost goes on elsewhere.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from shellv_core.config import Config
from shellv_core.errors import DiskFullError, IntegrityError, ObjectNotFoundError, ShellVError, TrainingError
from shellv_core.logs import get_logger
from shellv_core.storage import FileEntry, delete_prefix, join, local_path, open_store, sha256_of, write_bytes

logger = get_logger(__name__)
MANIFEST_NAME = "manifest.json"
META_NAME = "meta.json"
STATE_NAME = "state.safetensors"
POINTER_NAME = "latest.json"
FULL = (errno.ENOSPC, errno.EDQUOT)


class CheckpointManifest(Config):
    """The files of a complete checkpoint but this one; names are relative to its folder."""

    files: list[FileEntry]


@dataclass(frozen=True)
class Checkpoint:
    """A complete, verified checkpoint on this machine's disk.

    Attributes:
        step: optimizer steps done.
        identity: of the run that wrote it.
        meta: what was saved beside the state, in JSON's types.
    """

    step: int
    identity: str
    meta: dict[str, Any]
    directory: Path

    def tensors(self) -> dict[str, torch.Tensor]:
        """The state that `Checkpoints.save` got, on the CPU."""
        return load_file(self.directory / STATE_NAME)


def read_checkpoint(directory: Path) -> Checkpoint:
    """The checkpoint in a ``step-N`` folder, every byte verified.

    Raises:
        IntegrityError: if it is incomplete or damaged.
    """
    try:
        manifest = CheckpointManifest.model_validate_json((directory / MANIFEST_NAME).read_bytes())
        damaged = [entry.name for entry in manifest.files if sha256_of(directory / entry.name) != entry.sha256]
        if damaged:
            raise IntegrityError(f"{directory}: {', '.join(damaged)} differs from the manifest.")
        return Checkpoint(**json.loads((directory / META_NAME).read_bytes()), directory=directory)
    except (OSError, ValueError) as error:
        raise IntegrityError(f"{directory} is not a complete checkpoint: {error}") from None


class Checkpoints:
    """The checkpoints of one run.

    With several processes on one disk, one of them holds this object; the others take part in `save_files`.

    Args:
        directory: local folder.
        address: ``s3://`` or ``file://`` folder of this run's own for copies; None for none.
        identity: of the run; the checkpoints of another are refused.
        keep: how many are kept, here and there.
    """

    def __init__(self, directory: Path, address: str | None, identity: str, keep: int = 2) -> None:
        path = local_path(address) if address else None
        self.directory, self.identity, self.keep = directory, identity, keep
        self.address = path.as_uri() if path else address
        self._last: int | None = None
        self._damaged: set[int] = set()
        self._pending: Future[None] | None = None
        self._writer = ThreadPoolExecutor(1, "checkpoints")
        directory.mkdir(parents=True, exist_ok=True)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        """Wait for what is being written; its failure does not hide another one."""
        try:
            self.wait()
        except Exception as failure:
            if error is None:
                raise
            logger.error("a checkpoint could not be written: %s", failure)
        finally:
            self._writer.shutdown()

    def latest(self) -> Checkpoint | None:
        """The newest complete checkpoint that verifies, fetched if only the address has it; None if there is none.

        Raises:
            TrainingError: if it belongs to another run.
            StorageError: if the address cannot be read.
        """
        self.wait()
        stored = self._stored_steps()
        for step in sorted({*self._steps(), *stored}, reverse=True):
            found = self._read(step, stored)
            if found is None:
                self._damaged.add(step)
                continue
            if found.identity != self.identity:
                raise TrainingError(
                    f"the checkpoint {found.directory} belongs to a run with other data or settings; delete it and"
                    " start again."
                )
            self._last = step
            return found
        return None

    def save(self, step: int, state: Mapping[str, torch.Tensor], meta: Mapping[str, Any]) -> None:
        """Copy `state` and write it in the background; waits for an earlier one first.

        Args:
            meta: JSON values.

        Raises:
            StorageError: if the earlier one could not be written; `DiskFullError` where its disk is full.
        """
        self.wait()
        snapshot = _snapshot(state)
        self._start(step, meta, lambda directory: save_file(snapshot, directory / STATE_NAME))

    def save_files(self, step: int, write: Callable[[Path], None], meta: Mapping[str, Any]) -> None:
        """Have `write` put files into a new folder, then commit them in the background.

        Args:
            write: where several processes write, it begins with a barrier (the folder is there) and ends with one
                (their files are). The others call theirs with `unfinished(step)`.
            meta: JSON values.
        """
        self.wait()
        with self._cleaning(step) as directory:
            write(directory)
        self._start(step, meta)

    def unfinished(self, step: int) -> Path:
        """The folder in which the checkpoint of `step` comes to be."""
        return self.directory / f".step-{step}.tmp"

    def wait(self) -> None:
        """Wait until what is being written is committed, here and at the address.

        Raises:
            StorageError: if it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def describe_last(self) -> str:
        """Where the last good checkpoint is, for people."""
        with contextlib.suppress(ShellVError):
            self.wait()
        if self._last is None:
            return "there is no checkpoint yet"
        copy = f" (copy: {join(self.address, f'step-{self._last}')})" if self.address else ""
        return f"the last good checkpoint is that of step {self._last}, {self._folder(self._last)}{copy}"

    def _start(self, step: int, meta: Mapping[str, Any], write: Callable[[Path], None] | None = None) -> None:
        content = json.dumps({"step": step, "identity": self.identity, "meta": dict(meta)}).encode()

        def run() -> None:
            if write is not None:
                with self._cleaning(step) as directory:
                    write(directory)
            self._commit(step, content)

        self._pending = self._writer.submit(run)

    @contextlib.contextmanager
    def _cleaning(self, step: int) -> Iterator[Path]:
        """A new folder that is gone if it cannot be filled."""
        directory = self.unfinished(step)
        shutil.rmtree(directory, ignore_errors=True)
        try:
            with _full_disk(self.directory):
                directory.mkdir(parents=True)
                yield directory
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise

    def _commit(self, step: int, meta: bytes) -> None:
        directory, folder = self.unfinished(step), self._folder(step)
        try:
            with _full_disk(self.directory):
                (directory / META_NAME).write_bytes(meta)
                paths = sorted(path for path in directory.rglob("*") if path.is_file())
                entries = [_entry(path, path.relative_to(directory).as_posix()) for path in paths]
                manifest = directory / MANIFEST_NAME
                manifest.write_text(CheckpointManifest(files=entries).model_dump_json(indent=1))
                for path in [*paths, manifest, *(each for each in directory.rglob("*") if each.is_dir()), directory]:
                    _sync(path)
                self._place(directory, folder)
                write_bytes((self.directory / POINTER_NAME).as_uri(), _pointer(step))
        except BaseException:
            shutil.rmtree(directory, ignore_errors=True)
            raise
        self._damaged.discard(step)
        if self.address:
            self._upload(self.address, folder, [entry.name for entry in entries], step)
        self._last = step
        self._remove_old(step)

    def _place(self, directory: Path, folder: Path) -> None:
        if folder.exists():  # Only a damaged one is ever written again.
            self._remove(folder)
        directory.rename(folder)
        _sync(self.directory)

    def _remove(self, folder: Path) -> None:
        """Remove a committed folder without a moment in which half of it looks like all of it."""
        gone = folder.with_name(f".{folder.name}.old")
        shutil.rmtree(gone, ignore_errors=True)
        folder.rename(gone)
        shutil.rmtree(gone)

    def _upload(self, address: str, folder: Path, names: Iterable[str], step: int) -> None:
        store, target = open_store(address), join(address, folder.name)
        store.delete(join(target, MANIFEST_NAME))
        for name in [*names, MANIFEST_NAME]:
            store.upload(folder / name, join(target, name))
        store.write_bytes(join(address, POINTER_NAME), _pointer(step))

    def _remove_old(self, step: int) -> None:
        for old in self._old(self._steps(), step):
            self._remove(self._folder(old))
        for leftover in self.directory.glob(".step-*"):
            shutil.rmtree(leftover)
        if self.address:
            for old in self._old(self._stored_steps(complete=False), step):
                target = join(self.address, f"step-{old}")
                open_store(target).delete(join(target, MANIFEST_NAME))
                delete_prefix(target)

    def _old(self, steps: Iterable[int], newest: int) -> list[int]:
        """Those of `steps` that go: beyond the count, or not good."""
        good = sorted(each for each in steps if each <= newest and each not in self._damaged)
        return [each for each in steps if each not in good[-self.keep :]]

    def _read(self, step: int, stored: Iterable[int]) -> Checkpoint | None:
        """The checkpoint of `step` from the disk, else from the address; None if neither verifies."""
        sources: list[Callable[[int], Checkpoint]] = []
        if self._folder(step).exists():
            sources.append(lambda step: read_checkpoint(self._folder(step)))
        if step in stored:
            sources.append(self._fetch)
        for source in sources:
            try:
                return source(step)
            except IntegrityError as error:
                logger.warning("passing over a damaged checkpoint: %s", error)
        return None

    def _fetch(self, step: int) -> Checkpoint:
        target = join(self.address or "", f"step-{step}")
        store = open_store(target)
        with self._cleaning(step) as directory:
            try:
                content = store.read_bytes(join(target, MANIFEST_NAME))
                for entry in CheckpointManifest.model_validate_json(content).files:
                    if ".." in Path(entry.name).parts or Path(entry.name).is_absolute():
                        raise IntegrityError(f"{target} lists a file {entry.name!r} outside itself.")
                    store.download(join(target, entry.name), directory / entry.name)
            except (ObjectNotFoundError, ValueError) as error:
                raise IntegrityError(f"{target} is not a complete checkpoint: {error}") from None
            (directory / MANIFEST_NAME).write_bytes(content)
            read_checkpoint(directory)
            self._place(directory, self._folder(step))
        return read_checkpoint(self._folder(step))

    def _folder(self, step: int) -> Path:
        return self.directory / f"step-{step}"

    def _steps(self) -> set[int]:
        found = (re.fullmatch(r"step-(\d+)", path.name) for path in self.directory.iterdir())
        return {int(match[1]) for match in found if match}

    def _stored_steps(self, complete: bool = True) -> set[int]:
        if not self.address:
            return set()
        last = MANIFEST_NAME if complete else ".+"
        uris = open_store(self.address).list_uris(self.address)
        found = (re.fullmatch(rf"/step-(\d+)/{last}", uri.removeprefix(self.address.rstrip("/"))) for uri in uris)
        return {int(match[1]) for match in found if match}


def _snapshot(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copies on the CPU, from an accelerator through pinned memory and all at once."""
    copies = {}
    for name, tensor in state.items():
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
        copies[name] = copy.copy_(tensor.detach(), non_blocking=True)
    if any(tensor.is_cuda for tensor in state.values()):
        torch.cuda.synchronize()
    return copies


def _entry(path: Path, name: str) -> FileEntry:
    return FileEntry(name=name, bytes=path.stat().st_size, sha256=sha256_of(path))


def _pointer(step: int) -> bytes:
    return json.dumps({"step": step, "directory": f"step-{step}"}).encode()


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _full_disk(directory: Path) -> Iterator[None]:
    try:
        yield
    except (OSError, SafetensorError) as error:
        # safetensors has the number in its text alone.
        full = any(f"os error {number})" in str(error) for number in FULL)
        if not full and (not isinstance(error, OSError) or error.errno not in FULL):
            raise
        raise DiskFullError(
            f"no space is left for a checkpoint in {directory}. Free some, or point SHELLV_HOME at another disk, then"
            " rerun: training goes on from the checkpoint before."
        ) from None
