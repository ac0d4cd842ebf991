"""``python -m containers build|requirements|sbom``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from shellv_core.errors import ConfigError, ShellVError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0 done, 1 failed, 2 wrong settings, 130 interrupted."""
    options = _parser().parse_args(argv)
    try:
        {"build": _build, "requirements": _requirements, "sbom": _sbom}[options.command](options)
    except ShellVError as error:
        print(f"containers: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("containers: interrupted; what was built is kept", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m containers", description="Build the images and look into them.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    building = commands.add_parser("build", help="build all images and write the lock file")
    building.add_argument("--base-image", metavar="REFERENCE", help="base of all images (each image's own)")
    building.add_argument("--push", metavar="REGISTRY", help="push them there, for example registry.example/team")
    pinning = commands.add_parser("requirements", help="write the images' pinned packages")
    pinning.add_argument("--check", action="store_true", help="only tell whether the committed files are current")
    commands.add_parser("sbom", help="list what is in the images and its known vulnerabilities")
    return parser


def _build(options: argparse.Namespace) -> None:
    from containers.build import build

    build(options.base_image, options.push, lambda line: print(line, flush=True))


def _requirements(options: argparse.Namespace) -> None:
    from containers.catalogue import IMAGES
    from containers.requirements import requirements_text

    stale = []
    for image in IMAGES.values():
        text = requirements_text(image)
        if not image.requirements.is_file() or image.requirements.read_text(encoding="utf-8") != text:
            stale.append(str(image.requirements))
            if not options.check:
                image.requirements.write_text(text, encoding="utf-8")
    if options.check and stale:
        raise ShellVError(
            f"{', '.join(stale)}: not what pyproject.toml and constraints.txt give; run `python -m"
            " containers requirements`."
        )


def _sbom(options: argparse.Namespace) -> None:
    from containers.sbom import inspect_images

    inspect_images(lambda line: print(line, flush=True))


if __name__ == "__main__":
    sys.exit(main())
