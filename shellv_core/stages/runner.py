"""What all stages have in common: checks first, an identity, reuse, tracking and the commit.

A stage is ``run(config) -> StageResult``. Its identity is a fingerprint over its settings, the content of its inputs
and the code that it runs; an output that was committed under the same fingerprint is returned at once.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib.metadata
import platform
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import shellv_core
from shellv_core.config import Config, effective_values, fingerprint
from shellv_core.errors import ConfigError, DiskFullError, ShellVError, StorageError
from shellv_core.logs import get_logger
from shellv_core.storage import InputDirectory, Manifest, OutputDirectory, check_access, delete_prefix, home

if TYPE_CHECKING:
    from shellv_core.tracking.runs import TrackedRun

logger = get_logger(__name__)

FINGERPRINT_PLACEHOLDER = "{fingerprint}"
FINGERPRINT_DIGITS = 16
CHECKPOINTS_BESIDE_OUTPUT = "output"
#: The source that the training stages run.
TRAINING_CODE = (
    *(
        f"data/{name}.py"
        for name in (
            "conversation", "decode", "encoder", "index", "lengths", "loader", "order", "packing", "reader", "samples",
            "shards",
        )
    ),
    "models", "stages/heads.py", "templates.py", "training",
)  # fmt: skip
RECORDED_PACKAGES = ("torch", "transformers", "peft", "tokenizers", "numpy", "pillow", "mlflow-skinny")


class StageConfig(Config):
    """Settings that every stage has.

    Attributes:
        output_uri: folder for the output, ``s3://`` or ``file://``; ``{fingerprint}`` in it stands for the first 16
            digits of the run's fingerprint.
        seed: seed of every random choice in the stage.
    """

    output_uri: str = ""
    seed: int = 0


class StageResult(Config):
    """What a stage returns; `reused` tells that an earlier run had made it already."""

    stage: str
    output_uri: str
    fingerprint: str
    reused: bool
    metrics: dict[str, float] = {}
    details: dict[str, Any] = {}


S = TypeVar("S", bound=StageConfig)


@dataclass
class StageRun(Generic[S]):
    """What a stage's body works with.

    Attributes:
        work: local scratch folder, empty at the first try; it survives a kill and goes at the commit.
        checkpoints: address for copies of the checkpoints, which go at the commit too; None for none.
        metrics, details: filled by the body, recorded in the manifest and the result.
    """

    config: S
    fingerprint: str
    inputs: dict[str, InputDirectory]
    output: OutputDirectory
    work: Path
    tracked: TrackedRun
    checkpoints: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record values in MLflow as they arise."""
        self.tracked.log_metrics(metrics, step)


def run_stage(
    name: str,
    config: S,
    body: Callable[[StageRun[S]], None],
    inputs: Mapping[str, str | None] | None = None,
    code: Sequence[str] = (),
    reuse: Callable[[Manifest], bool] = lambda committed: True,
    checkpoint_uri: str | None = None,
) -> StageResult:
    """Run a stage's `body` once for its settings, inputs and code.

    Args:
        name: the stage's one name.
        inputs: input name -> URI of a committed folder; "" is a missing one, None an optional one left out. An input
            ``data`` stands for the config field ``data_uri``, which then counts by content, not by address.
        code: subpackages of the library whose source is part of the identity.
        reuse: whether an output committed before still stands; stages whose effect lies outside their output look
            there, and run again where it does not.
        checkpoint_uri: see `TrainingConfig.checkpoint_uri`.

    Raises:
        ShellVError: with all faults of access at once, before any work; an output left by a run that failed with
            such an error is removed.
    """
    sources = {key: uri for key, uri in (inputs or {}).items() if uri is not None}
    elsewhere = [checkpoint_uri] if checkpoint_uri and checkpoint_uri != CHECKPOINTS_BESIDE_OUTPUT else []
    output, directories = open_stage(name, config, sources, code, elsewhere)
    uri, identity = output.uri, output.fingerprint
    checkpoints = _checkpoint_address(checkpoint_uri, output)
    committed = output.finished()
    if committed and reuse(committed):
        logger.info("%s: reusing %s", name, uri)
        if checkpoints:
            delete_prefix(checkpoints)  # A kill right after the commit leaves them.
        return _result(uri, committed, reused=True)
    output.begin(replace=committed is not None)
    work = work_folder(name, output)
    logger.info("%s: writing %s", name, uri)
    from shellv_core.tracking.runs import track

    tags = {"shellv.fingerprint": identity, "shellv.output_uri": uri, "shellv.library_version": shellv_core.__version__}
    tags |= {f"shellv.input.{key}": directory.content_sha256 for key, directory in directories.items()}
    with aborting(output), track(name, config.model_dump(mode="json"), tags) as tracked:
        run = StageRun(config, identity, directories, output, work, tracked, checkpoints)
        body(run)
        tracked.log_metrics(run.metrics)
        manifest = output.commit(
            Manifest(
                stage=name,
                fingerprint=identity,
                library_version=shellv_core.__version__,
                config=config.model_dump(mode="json"),
                versions=_versions(),
                inputs={key: directory.reference() for key, directory in directories.items()},
                metrics=run.metrics,
                details=run.details,
            )
        )
    shutil.rmtree(work, ignore_errors=True)
    if checkpoints:
        delete_prefix(checkpoints)
    return _result(uri, manifest, reused=False)


def open_stage(
    name: str, config: StageConfig, inputs: Mapping[str, str], code: Sequence[str], others: Sequence[str] = ()
) -> tuple[OutputDirectory, dict[str, InputDirectory]]:
    """Check access and work out the run's identity; returns its output folder, not begun, and the opened inputs.

    Args:
        inputs: input name -> URI of a committed folder.
        code: see `run_stage`.
        others: further addresses that the run writes to.

    Raises:
        ShellVError: with all faults of access at once.
    """
    _require({"output_uri": config.output_uri, **{f"{key}_uri": uri for key, uri in inputs.items()}})
    _check_all([config.output_uri, *inputs.values(), *others])
    directories = {key: InputDirectory(uri) for key, uri in inputs.items()}
    addresses = {"output_uri", *(f"{key}_uri" for key in inputs)}
    identity = fingerprint(
        name,
        {key: value for key, value in effective_values(config).items() if key not in addresses},
        {key: directory.content_sha256 for key, directory in directories.items()},
        code_digest([f"stages/{name}.py", *code]),
    )
    uri = _with_fingerprint(config.output_uri, identity)
    return OutputDirectory(uri, identity), directories


def work_folder(name: str, output: OutputDirectory) -> Path:
    """The local scratch folder of a run, which survives a kill."""
    work = home() / "work" / f"{name}-{output.fingerprint[:FINGERPRINT_DIGITS]}"
    work.mkdir(parents=True, exist_ok=True)
    return work


def _with_fingerprint(uri: str, identity: str) -> str:
    return uri.replace(FINGERPRINT_PLACEHOLDER, identity[:FINGERPRINT_DIGITS])


def _checkpoint_address(checkpoint_uri: str | None, output: OutputDirectory) -> str | None:
    if checkpoint_uri == CHECKPOINTS_BESIDE_OUTPUT:
        # Beside, not inside: an output that failed is removed, and its last good checkpoint is not.
        checkpoint_uri = f"{output.uri}.checkpoints/{FINGERPRINT_PLACEHOLDER}"
    return checkpoint_uri and _with_fingerprint(checkpoint_uri, output.fingerprint)


def code_digest(parts: Sequence[str]) -> str:
    """SHA-256 over the source of the named modules and subpackages of the library, assets included."""
    root = Path(shellv_core.__file__).parent
    digest = hashlib.sha256()
    for part in sorted(parts):
        path = root / part
        files = [path] if path.is_file() else sorted(each for each in path.rglob("*") if each.is_file())
        for file in files:
            if "__pycache__" in file.parts:
                continue
            digest.update(file.relative_to(root).as_posix().encode() + b"\0")
            digest.update(hashlib.sha256(file.read_bytes()).digest())
    return digest.hexdigest()


@contextlib.contextmanager
def aborting(output: OutputDirectory) -> Iterator[None]:
    """Remove what was written if the user's settings, data or disk are at fault; a kill or a bug leaves it."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        output.abort()
        raise DiskFullError(
            f"no space is left on the disk that holds {error.filename or home()} ({error.strerror})."
            " Free some space or point SHELLV_HOME and output_uri elsewhere, then rerun."
        ) from None
    except ShellVError:
        # A store that failed may not let us tidy up either; the first error is the one to report.
        with contextlib.suppress(StorageError):
            output.abort()
        raise


def _require(uris: Mapping[str, str]) -> None:
    missing = [key for key, uri in uris.items() if not uri]
    if missing:
        named = ", ".join(f"{key}=URI" for key in missing)
        raise ConfigError(f"required and not given: {named}; a URI is s3://BUCKET/KEY or file:///ABSOLUTE/PATH.")


def _check_all(uris: Sequence[str]) -> None:
    faults: list[ShellVError] = []
    for uri in dict.fromkeys(uris):
        try:
            check_access(uri)
        except ShellVError as error:
            faults.append(error)
    if faults:
        kind = type(faults[0]) if len({type(fault) for fault in faults}) == 1 else ShellVError
        raise kind(" | ".join(dict.fromkeys(str(fault) for fault in faults)))


def _result(uri: str, manifest: Manifest, reused: bool) -> StageResult:
    return StageResult(
        stage=manifest.stage,
        output_uri=uri,
        fingerprint=manifest.fingerprint,
        reused=reused,
        metrics=manifest.metrics,
        details=manifest.details,
    )


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version(), "shellv_core": shellv_core.__version__}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions
