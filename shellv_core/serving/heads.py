"""Where a served model's HACL heads are: they lie beside the adapter that they were trained with, not in the model."""

from __future__ import annotations

from pathlib import Path

from shellv_core.errors import ServingError, StorageError
from shellv_core.logs import get_logger
from shellv_core.serving.reference import find_registered, opened_output
from shellv_core.storage import InputDirectory, local_path
from shellv_core.storage.directories import MANIFEST_NAME
from shellv_core.tracking.lineage import look_up

logger = get_logger(__name__)

HEADS = "hacl/heads.safetensors"
#: merge_lora's name for the output of finetune.
FINETUNED = "adapter"


def fetch_heads(reference: str) -> Path:
    """The file of heads that `reference` names: itself, or an output of finetune or merge_lora, or a registered model.

    Raises:
        ServingError: if there is none.
        StorageError: if an output cannot be read.
    """
    path = Path(reference) if "://" not in reference else local_path(reference)
    if path is not None and not reference.startswith("models:"):
        for each in (path, path / "heads.safetensors", path / HEADS):
            if each.is_file():
                return each.absolute()
    found = find_heads(reference)
    if found is None:
        raise ServingError(
            f"{reference} leads to no HACL heads; give a heads.safetensors, or the output of a finetune with"
            " hacl.weight above 0."
        )
    return found


def find_heads(reference: str) -> Path | None:
    """The heads that a model was trained with, found by what its output was made from; None where nothing tells.

    Args:
        reference: of a model, as in `fetch_model`.

    Raises:
        ServingError: if it is a registered version that does not exist.
        StorageError: if the model's output cannot be read.
    """
    if reference.startswith("models:"):
        uri = find_registered(reference).uri
    else:
        folder = Path(reference) if "://" not in reference else local_path(reference)
        uri = reference
        if folder is not None:
            holding = [each for each in (folder, folder.parent) if (each / MANIFEST_NAME).is_file()]
            if not holding:
                return None
            uri = holding[0].absolute().as_uri()
    with opened_output(uri) as output:
        return _heads_of(output)


def _heads_of(output: InputDirectory) -> Path | None:
    if output.files(HEADS):
        return output.fetch(HEADS)
    trained = output.manifest.inputs.get(FINETUNED)
    if trained is None:
        return None
    ancestor = look_up(trained)
    if ancestor.problem:
        logger.warning(
            "no HACL heads: they lie in %s, but %s; give --heads where they are now", trained.uri, ancestor.problem
        )
        return None
    try:
        source = InputDirectory(trained.uri)
        return source.fetch(HEADS) if source.files(HEADS) else None
    except StorageError as error:
        logger.warning("no HACL heads: %s", error)
        return None
