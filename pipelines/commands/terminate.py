"""``python -m pipelines terminate``: end a run."""

from __future__ import annotations

import argparse
from typing import Any

from pipelines.client import settings


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = commands.add_parser("terminate", help="end a run; nothing happens to one that has ended")
    parser.add_argument("run_id", metavar="RUN", help="id of the run, as submit and status print it")
    settings.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Ask the server to end the run."""
    from pipelines.client.connection import Server
    from pipelines.client.outcome import FINAL_STATES
    from pipelines.client.runs import terminate_run

    state = terminate_run(Server(settings.settings(options)), options.run_id)
    if state in FINAL_STATES:
        print(f"run {options.run_id} has ended before: {state.lower()}")
    else:
        print(f"run {options.run_id} is being terminated")
    return 0
