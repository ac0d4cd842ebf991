"""A base image from Debian's packages, for where no registry is in reach."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path

from containers.commands import CommandError, output_of, run

SUITE = "bookworm"
LOCAL_BASE = f"localhost/shellv-base:{SUITE}"
PACKAGES = ("ca-certificates", "libgomp1", "libstdc++6", "python3", "python3-venv")
LEFT_OUT = ("/usr/share/doc/*", "/usr/share/locale/*", "/usr/share/man/*")


def make_base(engine: str) -> None:
    """Make `LOCAL_BASE`: Debian's essential packages and Python.

    Raises:
        CommandError: if mmdebstrap is not installed or Debian's archive is not in reach.
    """
    if shutil.which("mmdebstrap") is None:
        raise CommandError("mmdebstrap is not installed; `make podman` installs it on Debian and Ubuntu.")
    with tempfile.TemporaryDirectory(prefix="shellv-base-") as folder:
        archive = Path(folder, "base.tar")
        run(bootstrap_command(archive))
        output_of([engine, "import", str(archive), LOCAL_BASE], timeout=600)


def bootstrap_command(archive: Path) -> list[str]:
    """The arguments that write the file system to `archive`."""
    return [
        "mmdebstrap",
        "--quiet",
        "--variant=essential",
        f"--include={','.join(PACKAGES)}",
        *(f"--dpkgopt=path-exclude={pattern}" for pattern in LEFT_OUT),
        SUITE,
        str(archive),
    ]
