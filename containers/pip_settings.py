"""The settings of the user's pip, for the builds: indexes, folders of wheels and certificates stay out of the images.

They come from ``pip config list`` as the build starts and are mounted below ``/mnt``, a folder that every base has, so
that not even their places are left in a layer.
"""

from __future__ import annotations

import ast
import contextlib
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from containers.commands import output_of

MOUNT = "/mnt"
CERTIFICATES = Path("/etc/ssl/certs")
KEPT = ("index-url", "extra-index-url", "find-links", "no-index", "trusted-host", "cert", "proxy", "timeout", "retries")
INDEXES = ("index-url", "extra-index-url")


@contextlib.contextmanager
def pip_mounts() -> Iterator[list[str]]:
    """``--volume`` arguments for podman's build, valid within the context; none where pip has no settings."""
    settings = parse(output_of([sys.executable, "-m", "pip", "config", "list"]))
    mounts = [f"{CERTIFICATES}:{CERTIFICATES}:ro"] if CERTIFICATES.is_dir() else []
    with tempfile.TemporaryDirectory(prefix="shellv-pip-") as folder:
        if settings:
            text, places = mounted(settings)
            path = Path(folder, "pip.conf")
            path.write_text(text, encoding="utf-8")
            mounts.append(f"{folder}:{MOUNT}:ro")
            for number, place in enumerate(places):
                Path(folder, str(number)).mkdir()
                mounts.append(f"{place}:{MOUNT}/{number}:ro")
        yield [f"--volume={mount}" for mount in mounts]


def parse(listing: str) -> dict[str, list[str]]:
    """The settings that matter to a build, by name, from what ``pip config list`` prints."""
    found: dict[str, list[str]] = {}
    for line in listing.splitlines():
        key, separator, value = line.partition("=")
        name = key.rpartition(".")[2]
        if separator and name in KEPT:
            parts = str(ast.literal_eval(value)).split()
            found[name] = list(dict.fromkeys([*found.get(name, []), *parts]))
    return found


def mounted(settings: dict[str, list[str]]) -> tuple[str, list[Path]]:
    """A pip.conf with local folders at the places where they are mounted, and those folders in the order of places."""
    places: list[Path] = []
    lines = ["[global]"]
    for name, values in settings.items():
        shown = []
        for value in values:
            path = Path(re.sub("^file://", "", value))
            if path.is_absolute() and path.is_dir():
                # Pages of an index link to files beside it.
                place = path.parent if name in INDEXES else path
                if place not in places:
                    places.append(place)
                inside = f"{MOUNT}/{places.index(place)}" + (f"/{path.name}" if name in INDEXES else "")
                value = f"file://{inside}" if value.startswith("file:") else inside
            shown.append(value)
        lines.append(f"{name} = {' '.join(shown)}")
    return "\n".join(lines) + "\n", places
