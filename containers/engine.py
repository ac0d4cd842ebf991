"""Podman or Docker, whichever is there."""

from __future__ import annotations

import json
import shutil
from typing import Any

from containers.commands import CommandError, output_of, succeeds

PULL_TIMEOUT_SECONDS = 1800.0


def find_engine() -> str:
    """``podman`` or ``docker``, the first that is installed.

    Raises:
        CommandError: if neither is.
    """
    for name in ("podman", "docker"):
        if shutil.which(name):
            return name
    raise CommandError("neither podman nor docker is installed; `make podman` installs podman on Debian and Ubuntu.")


def image_exists(engine: str, reference: str) -> bool:
    """Whether the image is in the engine's own store."""
    return succeeds([engine, "image", "inspect", "--format", "{{.Id}}", reference])


def pull(engine: str, reference: str) -> bool:
    """Fetch an image; False where its registry is not in reach or lacks it."""
    return image_exists(engine, reference) or succeeds([engine, "pull", "--quiet", reference], PULL_TIMEOUT_SECONDS)


def inspect(engine: str, reference: str) -> dict[str, Any]:
    """What the engine knows of an image in its store."""
    found: list[dict[str, Any]] = json.loads(output_of([engine, "image", "inspect", reference]))
    return found[0]


def digest_of(engine: str, reference: str) -> str:
    """The digest of an image's manifest, by which it can be named.

    Raises:
        CommandError: if it has none, as with Docker's classic store before a push.
    """
    repository = reference.rpartition(":")[0]
    known = inspect(engine, reference)
    for digest in [*(known.get("RepoDigests") or []), f"{repository}@{known.get('Digest', '')}"]:
        name, _, value = digest.partition("@")
        if name == repository and value.startswith("sha256:"):
            return str(value)
    raise CommandError(
        f"{engine} gives {reference} a digest only when it is pushed; use --push REGISTRY, Docker's containerd image"
        " store, or podman."
    )
