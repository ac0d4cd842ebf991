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
from shellv_core.stages.task import run_id
from shellv_core.storage import (
    InputDirectory,
    InputReference,
    Manifest,
    OutputDirectory,
    check_access,
    delete_prefix,
    home,
)

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
RECORDED_PACKAGES = ("torch", "transformers", "peft", "deepspeed", "tokenizers", "numpy", "pillow", "mlflow-skinny")


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
        first: whether this is the first process, the only one to write the output.
        checkpoints: address for copies of the checkpoints, which go at the commit too; None for none.
        metrics, details: filled by the body, recorded in the manifest and the result.
    """

    config: S
    fingerprint: str
    inputs: dict[str, InputDirectory]
    output: OutputDirectory
    work: Path
    first: bool = True
    checkpoints: str | None = None
    tracking: TrackedRun | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    details: dict[str, Any] = field(default_factory=dict)

    def log_metrics(self, metrics: Mapping[str, float], step: int = 0) -> None:
        """Record values in MLflow as they arise."""
        if self.tracking is not None:
            self.tracking.log_metrics(metrics, step)

    @property
    def tracked(self) -> TrackedRun:
        """The run in MLflow; the first process alone has one."""
        if self.tracking is None:
            raise RuntimeError("only the first process tracks")
        return self.tracking


def run_stage(
    name: str,
    config: S,
    body: Callable[[StageRun[S]], None],
    inputs: Mapping[str, str | None] | None = None,
    code: Sequence[str] = (),
    reuse: Callable[[Manifest], bool] = lambda committed: True,
    checkpoint_uri: str | None = None,
    others: Mapping[str, InputReference] | None = None,
    shared: bool = False,
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
        others: inputs that are no committed folders, by name; they count by content too.
        shared: whether the body shares its work among the processes that torchrun started. The first one decides,
            tracks and commits; the result comes in all.

    Raises:
        ShellVError: with all faults of access at once, before any work; an output left by a run that failed with
            such an error is removed.
    """
    from shellv_core.training.processes import from_first, joined, launched

    if not shared and launched().size > 1:
        raise ConfigError(
            f"{name} runs in one process; torchrun started {launched().size}. Only training stages share their work."
        )
    sources = {key: uri for key, uri in (inputs or {}).items() if uri is not None}
    elsewhere = [checkpoint_uri] if checkpoint_uri and checkpoint_uri != CHECKPOINTS_BESIDE_OUTPUT else []
    references = dict(others or {})
    output, directories = open_stage(name, config, sources, code, references, elsewhere)
    references |= {key: directory.reference() for key, directory in directories.items()}
    uri, identity = output.uri, output.fingerprint
    checkpoints = _checkpoint_address(checkpoint_uri, output)
    with joined() as launch:
        committed = output.finished() if launch.first else None
        reused = from_first(committed.model_dump(mode="json") if committed and reuse(committed) else None)
        if reused:
            logger.info("%s: reusing %s", name, uri)
            if checkpoints and launch.first:
                delete_prefix(checkpoints)  # A kill right after the commit leaves them.
            return result_of(uri, Manifest.model_validate(reused), reused=True)
        work = work_folder(name, output)
        manifest = None
        with contextlib.ExitStack() as stack:
            run = StageRun(config, identity, directories, output, work, launch.first, checkpoints)
            if launch.first:
                output.begin(replace=committed is not None)
                logger.info("%s: writing %s", name, uri)
                stack.enter_context(aborting(output))
                run.tracking = stack.enter_context(_tracked(name, config, output, references))
            body(run)
            if launch.first:
                run.log_metrics(run.metrics)
                manifest = output.commit(_manifest(name, run, references, code))
        # Until then the others wait: a launcher takes a process that ends for a sign that all may.
        manifest = Manifest.model_validate(from_first(manifest and manifest.model_dump(mode="json")))
        shutil.rmtree(work, ignore_errors=True)
        if checkpoints and launch.first:
            delete_prefix(checkpoints)
    return result_of(uri, manifest, reused=False)


def _tracked(
    name: str, config: StageConfig, output: OutputDirectory, inputs: Mapping[str, InputReference]
) -> contextlib.AbstractContextManager[TrackedRun]:
    from shellv_core.tracking.runs import track

    tags = {
        "shellv.fingerprint": output.fingerprint,
        "shellv.output_uri": output.uri,
        "shellv.library_version": shellv_core.__version__,
    }
    tags |= {f"shellv.input.{key}": reference.content_sha256 for key, reference in inputs.items()}
    if run_id():
        tags["shellv.pipeline_run"] = run_id()
    return track(name, config.model_dump(mode="json"), tags)


def _manifest(name: str, run: StageRun[Any], inputs: Mapping[str, InputReference], code: Sequence[str]) -> Manifest:
    from shellv_core.tracking.lineage import lineage_from_environment

    return Manifest(
        stage=name,
        fingerprint=run.fingerprint,
        library_version=shellv_core.__version__,
        config=run.config.model_dump(mode="json"),
        versions=_versions(),
        origin={
            "code_sha256": _code_of(name, code),
            "mlflow_run": run.tracked.run_id,
            **lineage_from_environment(),
        },
        inputs=dict(inputs),
        metrics=run.metrics,
        details=run.details,
    )


def open_stage(
    name: str,
    config: StageConfig,
    inputs: Mapping[str, str],
    code: Sequence[str],
    others: Mapping[str, InputReference] | None = None,
    elsewhere: Sequence[str] = (),
) -> tuple[OutputDirectory, dict[str, InputDirectory]]:
    """Check access and work out the run's identity; returns its output folder, not begun, and the opened inputs.

    Args:
        inputs: input name -> URI of a committed folder.
        code, others: see `run_stage`.
        elsewhere: further addresses that the run writes to.

    Raises:
        ShellVError: with all faults of access at once.
    """
    _require({"output_uri": config.output_uri, **{f"{key}_uri": uri for key, uri in inputs.items()}})
    _check_all([config.output_uri, *inputs.values(), *elsewhere])
    directories = {key: InputDirectory(uri) for key, uri in inputs.items()}
    contents = {key: directory.content_sha256 for key, directory in directories.items()}
    contents |= {key: reference.content_sha256 for key, reference in (others or {}).items()}
    addresses = {"output_uri", *(f"{key}_uri" for key in contents)}
    identity = fingerprint(
        name,
        {key: value for key, value in effective_values(config).items() if key not in addresses},
        contents,
        _code_of(name, code),
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
        checkpoint_uri = f"{output.uri}.checkpoints-{FINGERPRINT_PLACEHOLDER}"
    return checkpoint_uri and _with_fingerprint(checkpoint_uri, output.fingerprint)


def _code_of(name: str, parts: Sequence[str]) -> str:
    return code_digest([f"stages/{name}.py", *parts])


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


def result_of(uri: str, manifest: Manifest, reused: bool) -> StageResult:
    """What the stage returns that committed `manifest` at `uri`."""
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
