"""``python -m pipelines status``: the newest runs and the schedules of a server, or the tasks of one run."""

from __future__ import annotations

import argparse
from typing import Any

from pipelines.client import settings


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = commands.add_parser("status", help="the newest runs and the schedules, or the tasks of one run")
    parser.add_argument("run_id", metavar="RUN", nargs="?", help="id of a run whose tasks are listed")
    parser.add_argument("--count", type=int, default=10, help="how many runs (10)")
    settings.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Print the tables."""
    from pipelines.client.connection import Server
    from pipelines.client.overview import of_run, of_server
    from shellv_core.errors import ConfigError

    if options.count < 1:
        raise ConfigError(f"--count is {options.count}; it must be 1 or more.")
    server = Server(settings.settings(options))
    print(of_run(server, options.run_id) if options.run_id else of_server(server, options.count))
    return 0
