"""``python -m pipelines submit``: run a pipeline on a Kubeflow Pipelines server."""

from __future__ import annotations

import argparse
from typing import Any

from pipelines.client import choosing, settings


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = commands.add_parser(
        "submit",
        help="run a pipeline on a server",
        epilog="Exit codes with --wait: 0 succeeded, 3 failed, 4 still running at the end of --timeout, 5 terminated;"
        " 1 the server refuses or does not answer, 2 wrong settings, 130 Ctrl-C (the run goes on).",
    )
    choosing.add_arguments(parser)
    choosing.add_run_arguments(parser)
    parser.add_argument("--run-name", metavar="NAME", help="name of the run (the pipeline's and the time)")
    parser.add_argument("--wait", action="store_true", help="wait for its end; the exit code says how it ended")
    parser.add_argument("--timeout", metavar="SECONDS", type=float, help="wait so long at most; the run goes on")
    settings.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Check the parameters, upload the pipeline where it is missing, start the run and wait if asked to."""
    from pipelines.client.connection import Server
    from pipelines.client.runs import create_run, run_name
    from pipelines.client.versions import upload
    from pipelines.client.waiting import attach, wait

    pipeline = choosing.chosen(options)
    run_settings = choosing.run_settings(options, pipeline)
    server = Server(settings.settings(options))
    version = upload(server, pipeline)
    name = options.run_name or run_name(pipeline.name)
    started = create_run(server, name, version, run_settings)
    print(f"{name}: run {started.run_id} of version {version.name}")
    print(server.link(f"runs/details/{started.run_id}"))
    if not options.wait:
        print(f"wait for it: {attach(started.run_id)}")
        return 0
    return int(wait(server, started.run_id, options.timeout))
