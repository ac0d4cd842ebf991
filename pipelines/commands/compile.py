"""``python -m pipelines compile``: the YAML files that Kubeflow Pipelines takes."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

OUTPUT_FOLDER = Path("build") / "pipelines"


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = commands.add_parser(
        "compile",
        help="write the YAML files that Kubeflow Pipelines takes",
        description="Without options: write the files that are committed, pipelines, components and their READMEs."
        " With --profile or --locked: write all pipelines for that cluster, or with those images, to a folder.",
    )
    parser.add_argument("--profile", metavar="NAME", help="a cluster: one of pipelines/profiles, or a YAML file (cpu)")
    parser.add_argument("--locked", action="store_true", help="name images by the digests that `make images` wrote")
    parser.add_argument("--output", metavar="DIR", type=Path, help="folder of --profile and --locked (build/pipelines)")
    parser.add_argument("--check", action="store_true", help="only tell whether the committed files are current")


def run(options: argparse.Namespace) -> int:
    """Compile, or hold the committed files against the source.

    Raises:
        ConfigError: if options do not go together, or a profile or the lock file is wrong.
        ShellVError: if `options.check` and a committed file is stale.
    """
    from components.images import LOCK_PATH
    from pipelines.compile import DEFAULT_PROFILE, PIPELINES, committed_files, compiled_path, compiled_yaml
    from shellv_core.errors import ConfigError, ShellVError

    chosen = options.profile or options.locked or options.output
    if options.check and chosen:
        raise ConfigError("--check is about the committed files; leave out --profile, --locked and --output.")
    if chosen:
        profile, folder = options.profile or DEFAULT_PROFILE, options.output or OUTPUT_FOLDER
        lock = LOCK_PATH if options.locked else None
        texts = {compiled_path(name, profile, folder): compiled_yaml(name, profile, lock) for name in PIPELINES}
    else:
        texts = dict(committed_files())
    if options.check:
        stale = [str(path) for path, text in texts.items() if not path.is_file() or path.read_text("utf-8") != text]
        if stale:
            raise ShellVError(f"{', '.join(stale)}: not what the source makes; run `python -m pipelines compile`.")
        return 0
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        print(path)
    return 0
