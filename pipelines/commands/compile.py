"""``python -m pipelines compile``: the YAML files that Kubeflow Pipelines takes."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = commands.add_parser("compile", help="write the YAML files that Kubeflow Pipelines takes")
    parser.add_argument("--check", action="store_true", help="only tell whether the committed files are current")


def run(options: argparse.Namespace) -> int:
    """Compile all pipelines, or hold the committed files against the source.

    Raises:
        ShellVError: if `options.check` and a committed file is stale.
    """
    from pipelines.compile import PIPELINES, compiled_path, is_current, write
    from shellv_core.errors import ShellVError

    if not options.check:
        for name in PIPELINES:
            print(write(name))
        return 0
    stale = [str(compiled_path(name)) for name in PIPELINES if not is_current(name)]
    if stale:
        raise ShellVError(f"{', '.join(stale)}: not what the source compiles to; run `python -m pipelines compile`.")
    return 0
