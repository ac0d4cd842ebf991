"""Where a served model comes from: a folder, a committed stage output, or a registered version.

/path/to/model                      a model directory
s3://bucket/merge, file:///merge    the output of merge_lora or pretrain_projector
models:/NAME@ALIAS, models:/NAME/3  a registered version, whose source is such an output

An adapter is named the same way: by its folder, or by the output of finetune.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from shellv_core.config import fingerprint
from shellv_core.errors import ObjectNotFoundError, ServingError
from shellv_core.storage import InputDirectory, local_path, sha256_of
from shellv_core.storage.seaweedfs import embedded_s3, external_s3_configured

MODEL_PREFIX, ADAPTER_PREFIX = "model", "adapter"
MODEL_FILE, ADAPTER_FILE = "config.json", "adapter_config.json"
REGISTERED = re.compile(r"models:/(?P<name>[^/@]+)(?:@(?P<alias>[^/@]+)|/(?P<version>\d+))")


class NotRegisteredError(ServingError):
    """The registry holds no such version, or the alias names none; there may be one later."""


@dataclass(frozen=True)
class ModelFiles:
    """A model on this machine: `name` for clients, `revision` the SHA-256 over all its files' names and contents."""

    path: Path
    name: str
    revision: str


@dataclass(frozen=True)
class RegisteredSource:
    """A version of a registered model, and the address of the output that holds it."""

    name: str
    version: str
    uri: str


def fetch_model(reference: str) -> ModelFiles:
    """Bring the model that `reference` names to this machine, verified.

    Raises:
        ServingError: if the reference is of no known form, or names nothing.
        StorageError: if a stage's output cannot be read.
        TrackingError: if the registry does not answer.
    """
    if reference.startswith("models:"):
        registered = find_registered(reference)
        return _committed(registered.uri, registered.name)
    if "://" not in reference:
        return _folder(Path(reference))
    folder = local_path(reference)
    if folder is not None and (folder / MODEL_FILE).is_file():
        return _folder(folder)
    return _committed(reference, reference.rstrip("/").rpartition("/")[2])


def fetch_adapter(reference: str) -> ModelFiles:
    """Bring the LoRA adapter that `reference`, a folder or an output of finetune, names to this machine, verified.

    Raises:
        ServingError: if the reference names no adapter.
        StorageError: if a stage's output cannot be read.
    """
    folder = Path(reference) if "://" not in reference else local_path(reference)
    if folder is not None:
        for path in (folder, folder / ADAPTER_PREFIX):
            if (path / ADAPTER_FILE).is_file():
                return _read_folder(path.absolute(), reference.rstrip("/").rpartition("/")[2])
        if "://" not in reference:
            raise ServingError(
                f"{reference} is not an adapter (it has no {ADAPTER_FILE}). Give an adapter's folder, or the s3:// or"
                " file:// address of a finetune output."
            )
    return _committed(reference, reference.rstrip("/").rpartition("/")[2], ADAPTER_PREFIX)


def reference_name(reference: str) -> str:
    """What a model is called that has no name of its own: the end of its reference, without an alias or version."""
    match = REGISTERED.fullmatch(reference)
    if match is not None:
        return match["name"]
    if "://" not in reference:
        return _folder_name(Path(reference).absolute())
    return reference.rstrip("/").rpartition("/")[2]


def find_registered(reference: str) -> RegisteredSource:
    """The version that a ``models:/`` reference names.

    Raises:
        ServingError: if the reference has another form.
        NotRegisteredError: if there is no such version.
        TrackingError: if the registry does not answer.
    """
    match = REGISTERED.fullmatch(reference)
    if match is None:
        raise ServingError(f"{reference!r} is not a registered model; use models:/NAME@ALIAS or models:/NAME/VERSION.")
    from mlflow.exceptions import MlflowException

    from shellv_core.tracking.runs import open_client

    client = open_client()
    name = match["name"]
    try:
        if match["alias"]:
            version = client.get_model_version_by_alias(name, match["alias"])
        else:
            version = client.get_model_version(name, match["version"])
    except MlflowException as error:
        raise NotRegisteredError(
            f"{reference} names no registered version ({str(error).splitlines()[0]}). Run promote first, or give a"
            " model directory."
        ) from None
    return RegisteredSource(name, str(version.version), str(version.source))


def registered_revision(source: RegisteredSource) -> str:
    """The `ModelFiles.revision` of a registered version, without fetching its bytes.

    Raises:
        StorageError: if its output cannot be read.
    """
    with opened_output(source.uri) as output:
        return _revision(_entries(output, MODEL_PREFIX))


@contextlib.contextmanager
def opened_output(uri: str, prefix: str = MODEL_PREFIX) -> Iterator[InputDirectory]:
    """The committed output at `uri`, or above it where `uri` names its folder `prefix`; the store runs within."""
    uri = uri.rstrip("/")
    embedded = uri.startswith("s3://") and not external_s3_configured()
    with embedded_s3() if embedded else contextlib.nullcontext():
        try:
            output = InputDirectory(uri)
        except ObjectNotFoundError:
            # A registered version may name the model inside the output.
            output = InputDirectory(uri.removesuffix(f"/{prefix}"))
        yield output


def _committed(uri: str, name: str, prefix: str = MODEL_PREFIX) -> ModelFiles:
    with opened_output(uri, prefix) as output:
        entries = _entries(output, prefix)
        if not entries:
            made = "merge_lora or pretrain_projector" if prefix == MODEL_PREFIX else "finetune with LoRA"
            raise ServingError(f"{uri} holds no {prefix}/; give an output of {made}.")
        return ModelFiles(output.fetch_tree(prefix), name, _revision(entries))


def _entries(output: InputDirectory, prefix: str) -> list[tuple[str, str]]:
    return [(entry.name.removeprefix(f"{prefix}/"), entry.sha256) for entry in output.files(f"{prefix}/")]


def _folder(path: Path) -> ModelFiles:
    path = path.absolute()
    if not (path / MODEL_FILE).is_file():
        raise ServingError(
            f"{path} is not a model directory (it has no {MODEL_FILE}). Give a model directory, the s3:// or file://"
            " address of a merge_lora output, or models:/NAME@ALIAS."
        )
    return _read_folder(path, _folder_name(path))


def _folder_name(path: Path) -> str:
    return path.parent.name if path.name == MODEL_PREFIX else path.name


def _read_folder(path: Path, name: str) -> ModelFiles:
    files = sorted(file for file in path.rglob("*") if file.is_file())
    entries = [(file.relative_to(path).as_posix(), sha256_of(file)) for file in files]
    return ModelFiles(path, name, _revision(entries))


def _revision(entries: list[tuple[str, str]]) -> str:
    return fingerprint(sorted(entries))
