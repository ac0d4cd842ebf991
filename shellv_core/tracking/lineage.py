"""What a model was made from: the chain of committed outputs from a model back to its data, checked on the way."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from shellv_core.errors import BucketNotFoundError, ObjectNotFoundError, StorageError
from shellv_core.storage import InputDirectory, InputReference, Manifest

#: Name in a manifest's origin -> environment variable that tells it. Images carry the first (set as they are built);
#: pipelines set the second when they are compiled and the third from the pod's label ``pipeline/runid``.
ENVIRONMENT = {"commit": "SHELLV_COMMIT", "image": "SHELLV_IMAGE", "pipeline_run": "KFP_RUN_ID"}
DATA_STAGE = "prepare_data"
TAG_PREFIX = "shellv."


def lineage_from_environment() -> dict[str, str]:
    """What this process knows of where it runs: ``commit``, ``image`` and ``pipeline_run``, as far as they are set."""
    return {name: os.environ[variable] for name, variable in ENVIRONMENT.items() if os.environ.get(variable)}


@dataclass(frozen=True)
class Ancestor:
    """A committed output that a model was made from, or the model's own.

    Attributes:
        inputs: what it was made from, by the stage's name for it.
        manifest: None where it cannot be read.
        content_sha256: what whoever used it recorded of its content.
        problem: why it is not what was used; "" if it is.
    """

    uri: str
    content_sha256: str
    inputs: Mapping[str, InputReference]
    manifest: Manifest | None
    problem: str = ""

    @property
    def stage(self) -> str:
        """The stage that made it, where that can be told."""
        return self.manifest.stage if self.manifest else "unknown"

    def record(self) -> dict[str, str]:
        """Where it lies, what it is and who made it, on one level."""
        made = {"library_version": self.manifest.library_version, **self.manifest.origin} if self.manifest else {}
        record = {"stage": self.stage, "uri": self.uri, "content_sha256": self.content_sha256, **made}
        return record | ({"problem": self.problem} if self.problem else {})


def ancestry(uri: str, content_sha256: str) -> list[Ancestor]:
    """The output at `uri` and all that it was made from, data first.

    Reads manifests alone. An output that is gone or has changed is told as its `problem`; what it was made from cannot
    be followed then.

    Args:
        content_sha256: what is known of the content at `uri`.
    """
    found: dict[tuple[str, str], Ancestor] = {}

    def walk(reference: InputReference) -> None:
        key = reference.uri, reference.content_sha256
        if key in found:
            return
        ancestor = look_up(reference)
        for each in ancestor.inputs.values():
            walk(each)
        found[key] = ancestor

    walk(InputReference(uri=uri.rstrip("/"), content_sha256=content_sha256))
    return list(found.values())


def look_up(reference: InputReference) -> Ancestor:
    """The output that `reference` names, with what is wrong with it."""
    try:
        folder = InputDirectory(reference.uri)
    except StorageError as error:
        gone = isinstance(error, (ObjectNotFoundError, BucketNotFoundError))
        problem = "it is gone" if gone else f"it cannot be read: {error}"
        return Ancestor(reference.uri, reference.content_sha256, {}, None, problem)
    if folder.content_sha256 != reference.content_sha256:
        problem = (
            f"it has changed since it was used: its content hash was {reference.content_sha256[:12]}...,"
            f" it is {folder.content_sha256[:12]}... now"
        )
        return Ancestor(reference.uri, reference.content_sha256, {}, folder.manifest, problem)
    return Ancestor(reference.uri, reference.content_sha256, folder.manifest.inputs, folder.manifest)


def data_of(ancestors: Sequence[Ancestor]) -> Ancestor | None:
    """The data set among them."""
    return next((each for each in ancestors if each.stage == DATA_STAGE), None)


def lineage_tags(ancestors: Sequence[Ancestor]) -> dict[str, str]:
    """Tags of a registered version that tell what it was made from; the last of `ancestors` is the model's own output.

    ``shellv.data_uri`` and ``shellv.data_sha256``; ``shellv.library_version``, and where they are known
    ``shellv.commit``, ``shellv.image`` and ``shellv.pipeline_run`` of the model's own stage; and for each stage
    ``shellv.lineage.STAGE`` with all that is known of it (JSON).
    """
    tags: dict[str, str] = {}
    if data := data_of(ancestors):
        tags |= {f"{TAG_PREFIX}data_uri": data.uri, f"{TAG_PREFIX}data_sha256": data.content_sha256}
    own = ancestors[-1].record()
    tags |= {f"{TAG_PREFIX}{name}": own[name] for name in ("library_version", *ENVIRONMENT) if name in own}
    for ancestor in ancestors:
        key = f"{TAG_PREFIX}lineage.{ancestor.stage}"
        same = sum(each == key or each.startswith(f"{key}-") for each in tags)
        tags[f"{key}-{same + 1}" if same else key] = json.dumps(ancestor.record())
    return tags
