"""Builds the images, one after another, and writes the lock file."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import shellv_core
from components.images import CODE_LABEL, ImageName, LockedImage, image
from containers.base import LOCAL_BASE, make_base
from containers.catalogue import CONTAINERFILE, IMAGES, REPOSITORY, Image
from containers.commands import output_of, run
from containers.engine import digest_of, find_engine, image_exists, inspect, pull
from containers.lock import write_lock
from containers.pip_settings import pip_mounts
from shellv_core.stages.runner import code_digest


def build(base_image: str | None, push_to: str | None, show: Callable[[str], None]) -> None:
    """Build all images, push them if wanted, and write the lock file.

    Args:
        base_image: base of all images; by default each image's own, and where its registry is not in reach a base
            that is made here.
        push_to: registry and prefix to push to.
        show: takes lines for people.

    Raises:
        CommandError: if a program fails; the lock file is then as it was.
    """
    engine = find_engine()
    made: dict[ImageName, LockedImage] = {}
    for each in IMAGES.values():
        started = time.monotonic()
        base = base_image or _reachable_base(engine, each, show)
        reference = reference_of(each.name, push_to)
        show(f"{reference}: building on {base}")
        with pip_mounts() as mounts:
            run(build_command(engine, each, base, reference, mounts if engine == "podman" else []))
        digest = _push(engine, reference) if push_to else digest_of(engine, reference)
        made[each.name] = LockedImage(reference=reference, digest=digest)
        size, seconds = inspect(engine, reference)["Size"], time.monotonic() - started
        show(f"{reference}: {size / 1e6:.0f} MB in {seconds:.0f} s, {digest}")
    write_lock(made)


def reference_of(name: ImageName, registry: str | None) -> str:
    """The tagged name under which an image is built."""
    reference = image(name)
    return f"{registry.rstrip('/')}/{reference.rpartition('/')[2]}" if registry else reference


def build_command(engine: str, each: Image, base: str, reference: str, mounts: Sequence[str]) -> list[str]:
    """The arguments of one build."""
    labels = {
        "org.opencontainers.image.title": f"shellv-{each.name}",
        "org.opencontainers.image.version": shellv_core.__version__,
        "org.opencontainers.image.licenses": "Apache-2.0",
        CODE_LABEL: code_digest(["."]),
    }
    # No namespaces of its own: builds then work inside containers and virtual machines too.
    isolation = ["--isolation=chroot", "--layers", f"--ignorefile={REPOSITORY / '.containerignore'}"]
    return [
        engine,
        "build",
        "--quiet",
        *(isolation if engine == "podman" else []),
        *mounts,
        f"--build-arg=BASE_IMAGE={base}",
        f"--build-arg=IMAGE={each.name}",
        f"--target={each.target}",
        *(f"--label={name}={value}" for name, value in labels.items()),
        f"--file={CONTAINERFILE}",
        f"--tag={reference}",
        str(REPOSITORY),
    ]


def _reachable_base(engine: str, each: Image, show: Callable[[str], None]) -> str:
    if pull(engine, each.base):
        return each.base
    show(f"{each.base} is not in reach: {each.name} gets a base made here, without CUDA")
    if not image_exists(engine, LOCAL_BASE):
        make_base(engine)
    return LOCAL_BASE


def _push(engine: str, reference: str) -> str:
    if engine == "docker":
        run([engine, "push", "--quiet", reference])
        return digest_of(engine, reference)
    with tempfile.TemporaryDirectory(prefix="shellv-push-") as folder:
        path = Path(folder, "digest")
        output_of([engine, "push", "--quiet", f"--digestfile={path}", reference], timeout=None)
        return path.read_text(encoding="utf-8").strip()
