"""What a stage's result leaves in a workflow engine's artifacts: small files that refer to the object store.

Knows nothing of kfp: an artifact is anything with a `path` to write to and a `metadata` dictionary. Bulk data never
passes through here; it goes straight between a stage and the object store.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, Protocol

from shellv_core.stages.runner import StageResult
from shellv_core.storage import InputDirectory

#: Of the JSON that `write_reference` writes; another number means other keys.
REFERENCE_SCHEMA = 1


class Artifact(Protocol):
    """The part of an output artifact that is used here."""

    path: str
    metadata: dict[str, Any]


def write_reference(result: StageResult, artifact: Artifact) -> None:
    """Write where the output lies, what it holds and what it was made from (JSON) to the artifact.

    What fits a line is its metadata too. The hashes of single files stay in the output's own manifest.

    Raises:
        ObjectNotFoundError: if nothing was committed at the output's address.
    """
    output = InputDirectory(result.output_uri)
    manifest = output.manifest
    reference = {
        "stage": result.stage,
        "output_uri": result.output_uri,
        "fingerprint": result.fingerprint,
        "content_sha256": output.content_sha256,
        "library_version": manifest.library_version,
        "num_files": len(manifest.files),
        "num_bytes": sum(entry.bytes for entry in manifest.files),
    }
    artifact.metadata.update(reference)
    lineage = {"inputs": {name: each.model_dump() for name, each in manifest.inputs.items()}}
    more = {"versions": manifest.versions, "metrics": result.metrics, "details": result.details}
    _write_json(artifact, {"schema": REFERENCE_SCHEMA, **reference, **lineage, **more})


def write_metrics(result: StageResult, artifact: Artifact) -> None:
    """Show the metrics as the artifact's metadata, and write them (JSON) to its file, without which no cache hits."""
    artifact.metadata.update(result.metrics)
    _write_json(artifact, result.metrics)


def write_file(result: StageResult, name: str, artifact: Artifact) -> None:
    """Copy file `name` of the output to the artifact.

    Raises:
        ObjectNotFoundError: if the output has no such file.
    """
    path = Path(artifact.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    shutil.copyfile(InputDirectory(result.output_uri).fetch(name), path)


def write_text(text: str, artifact: Artifact) -> None:
    """Write text (UTF-8) to the artifact."""
    path = Path(artifact.path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text, encoding="utf-8")


class ConfusionArtifact(Artifact, Protocol):
    """An output artifact that shows a confusion matrix."""

    def log_confusion_matrix(self, categories: list[str], matrix: list[list[int]]) -> None:
        """Show `matrix`, a row for each true category and a column for each answered one."""


def write_confusion(result: StageResult, artifact: ConfusionArtifact) -> None:
    """Show how the candidate answered its yes/no questions, of the first benchmark that has them; POPE before others.

    The counts of all benchmarks and runs (JSON) go to the artifact's file.

    Raises:
        ObjectNotFoundError: if the output has no results.json.
    """
    results = json.loads(InputDirectory(result.output_uri).fetch("results.json").read_bytes())
    confusion = results["confusion"]
    counts = min(confusion["candidate"].items(), key=lambda each: each[0] != "pope", default=None)
    if counts is not None:
        categories = list(next(iter(counts[1].values())))
        # Nothing is neither in truth.
        matrix = [list(counts[1].get(right, dict.fromkeys(categories, 0)).values()) for right in categories]
        artifact.log_confusion_matrix(categories, matrix)
        artifact.metadata["benchmark"] = counts[0]
    _write_json(artifact, confusion)


def _write_json(artifact: Artifact, content: dict[str, Any]) -> None:
    write_text(json.dumps(content, indent=1, sort_keys=True) + "\n", artifact)
