"""``shellv rollback``: the version that the champion took over from is champion again."""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import TYPE_CHECKING

from shellv_core.errors import PromotionError

if TYPE_CHECKING:
    from shellv_core.tracking.registry import RegisteredVersion

DESCRIPTION = """\
Let the version that the champion took over from be champion again, or the one that --to names:

  shellv rollback shellv-nano --reason "it answers in the wrong language"

Every byte of that version's model is compared with its manifest first. The version that steps down keeps the reason,
and promote lets it back with override_reason alone.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare which way to go back."""
    parser.description = DESCRIPTION
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("name", metavar="NAME", help="a registered model")
    parser.add_argument("--to", metavar="VERSION", help="go to this version instead")
    parser.add_argument("--reason", default="no reason given", metavar="TEXT", help="why, for the record")


def main(args: argparse.Namespace) -> int:
    """Roll back and say so; returns the exit code.

    Raises:
        PromotionError: if there is no champion or nothing to go back to, or that version's model is gone or damaged.
        TrackingError: if MLflow does not answer or refuses.
    """
    from shellv_core.tracking.championship import roll_back
    from shellv_core.tracking.registry import ModelRegistry

    move, version = roll_back(ModelRegistry(args.name), args.to, args.reason, check_servable)
    sys.stdout.write(
        f"version {move.after} of {version.name} is champion instead of version {move.before}"
        f" (by {move.by}: {move.reason})\n"
    )
    return 0


def check_servable(version: RegisteredVersion) -> None:
    """Compare every byte of a registered model with its manifest.

    Raises:
        PromotionError: if it is gone, damaged, or not what was registered.
        StorageError: if the store does not answer.
    """
    from shellv_core.data.verification import verify
    from shellv_core.storage import InputDirectory, InputReference
    from shellv_core.storage.seaweedfs import embedded_s3, external_s3_configured
    from shellv_core.tracking.lineage import look_up
    from shellv_core.tracking.registry import SHA256_TAG

    own_store = version.model_uri.startswith("s3://") and not external_s3_configured()
    with embedded_s3() if own_store else contextlib.nullcontext():
        sha256 = version.tags.get(SHA256_TAG, "")
        found = look_up(InputReference(uri=version.model_uri, content_sha256=sha256))
        problems = [found.problem] if found.problem else list(map(str, verify(InputDirectory(version.model_uri))))
    if problems:
        raise PromotionError(
            f"version {version.version} of {version.name!r} cannot be champion again: its model at {version.model_uri}"
            f" is not what was registered ({'; '.join(problems)}). Restore it, or name another version with --to."
        )
