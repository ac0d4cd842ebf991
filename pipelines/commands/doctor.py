"""``python -m pipelines doctor``: is everything there that a run on the cluster needs?"""

from __future__ import annotations

import argparse
from typing import Any

from pipelines.client import settings


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = commands.add_parser(
        "doctor",
        help="is everything there that a run on the cluster needs?",
        epilog="Exit code: 0 if no check failed (what could not be checked is listed), 1 otherwise.",
    )
    parser.add_argument("--root-uri", metavar="URI", help="folder of all outputs, s3://BUCKET/PREFIX, to try out")
    parser.add_argument("--kubernetes-namespace", metavar="NAME", default="shellv", help="where the tasks run (shellv)")
    parser.add_argument("--json", action="store_true", help="print JSON")
    settings.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print a table of all checks."""
    from pipelines.client.doctor import as_json, as_table, examine

    checks = examine(options)
    print(as_json(checks) if options.json else as_table(checks))
    return int(any(each.status == "failed" for each in checks))
