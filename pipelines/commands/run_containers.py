"""``python -m pipelines run-containers``: the whole pipeline on this machine, one container for each task."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = commands.add_parser("run-containers", help="run the whole pipeline in containers on this machine")
    parser.add_argument("--preset", default="nano", help="settings of all stages (nano)")
    parser.add_argument("overrides", nargs="*", metavar="STAGE.key=value", help="single settings that differ")


def run(options: argparse.Namespace) -> int:
    """Run the pipeline and print what it made."""
    from pipelines.contained.run import run
    from pipelines.summary import summary
    from shellv_core.logs import setup_logging

    setup_logging()
    print(summary(run(options.preset, options.overrides)))
    return 0
