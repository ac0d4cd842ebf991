"""``python -m pipelines wait``: watch a run until it ends."""

from __future__ import annotations

import argparse
from typing import Any

from pipelines.client import settings


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = commands.add_parser(
        "wait",
        help="watch a run until it ends",
        epilog="Exit codes: 0 succeeded, 3 failed, 4 still running at the end of --timeout, 5 terminated; 1 the server"
        " refuses or does not answer, 2 wrong settings, 130 Ctrl-C (the run goes on).",
    )
    parser.add_argument("run_id", metavar="RUN", help="id of the run, as submit and status print it")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, help="wait so long at most; the run goes on")
    settings.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Wait for the run; the exit code says how it ended."""
    from pipelines.client.connection import Server
    from pipelines.client.waiting import wait

    return int(wait(Server(settings.settings(options)), options.run_id, options.timeout))
