"""What is in the images: bills of materials by Syft, and known vulnerabilities by pip-audit and debsecan.

Vulnerabilities are looked up in databases on the internet. Where one is not in reach that is said, and is no failure;
what was found is listed, and is for people to judge.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from components.images import read_lock
from containers.catalogue import FOLDER, IMAGES, Image
from containers.commands import CommandError, output_of, run
from containers.engine import find_engine

OUTPUT = FOLDER / "sbom"
FORMATS = {"spdx-json": "spdx.json", "cyclonedx-json": "cdx.json"}
SUITE = "bookworm"
AUDIT_TIMEOUT_SECONDS = 900.0


def inspect_images(show: Callable[[str], None]) -> None:
    """Write the bills of all images in the lock file below ``containers/sbom``, and list what is known against them.

    Args:
        show: takes lines for people.

    Raises:
        ConfigError: if there is no lock file.
        CommandError: if a program is missing or fails.
    """
    engine, lock = find_engine(), read_lock()
    OUTPUT.mkdir(exist_ok=True)
    for image in IMAGES.values():
        with tempfile.TemporaryDirectory(prefix="shellv-sbom-") as folder:
            archive = Path(folder, "image.tar")
            run([engine, "save", "--quiet", f"--output={archive}", lock.images[image.name].pinned])
            run(syft_command(image, archive))
        bill = json.loads((OUTPUT / f"{image.name}.spdx.json").read_text(encoding="utf-8"))
        show(f"{image.name}: {len(bill['packages'])} packages, {OUTPUT / image.name}.*.json")
        for line in [*python_vulnerabilities(image), *debian_vulnerabilities(engine, lock.images[image.name].pinned)]:
            show(f"{image.name}: {line}")


def syft_command(image: Image, archive: Path) -> list[str]:
    """The arguments that write an image's bills."""
    program = shutil.which("syft") or str(Path(sys.executable).with_name("syft"))
    outputs = [f"--output={format}={OUTPUT / f'{image.name}.{ending}'}" for format, ending in FORMATS.items()]
    return [program, "scan", "--quiet", f"--source-name=shellv-{image.name}", *outputs, f"docker-archive:{archive}"]


def python_vulnerabilities(image: Image) -> list[str]:
    """One line for each known vulnerability of the image's Python packages, or one that says why none was looked up."""
    command = [sys.executable, "-m", "pip_audit", f"--requirement={image.requirements}", "--disable-pip", "--no-deps"]
    command += ["--format=json", "--progress-spinner=off", "--vulnerability-service=osv"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=AUDIT_TIMEOUT_SECONDS, check=False)
    try:
        packages: list[dict[str, Any]] = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        said = (done.stderr.strip().splitlines() or ["it says nothing"])[-1][:160]
        return [f"Python packages not checked: pip-audit reaches no database ({said})"]
    found = [
        f"{each['name']} {each['version']}: {flaw['id']}, fixed in {', '.join(flaw['fix_versions']) or 'no version'}"
        for each in packages
        for flaw in each.get("vulns", [])
    ]
    return found or [f"no known vulnerability in {len(packages)} Python packages"]


def debian_vulnerabilities(engine: str, reference: str) -> list[str]:
    """As `python_vulnerabilities`, for Debian's packages that have a fixed version."""
    if shutil.which("debsecan") is None:
        return ["Debian packages not checked: debsecan is not installed"]
    with tempfile.TemporaryDirectory(prefix="shellv-sbom-") as folder:
        status = Path(folder, "status")
        status.write_text(
            output_of([engine, "run", "--rm", "--network=none", reference, "cat", "/var/lib/dpkg/status"])
        )
        try:
            found = output_of(
                ["debsecan", f"--suite={SUITE}", f"--status={status}", "--only-fixed"], AUDIT_TIMEOUT_SECONDS
            ).splitlines()
        except CommandError as error:
            return [f"Debian packages not checked: debsecan reaches no database ({str(error).splitlines()[-1]})"]
    return found or ["no Debian package with a known vulnerability that is fixed"]
