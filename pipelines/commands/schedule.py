"""``python -m pipelines schedule``: run a pipeline at the times of a cron expression."""

from __future__ import annotations

import argparse
from typing import Any

from pipelines.client import choosing, settings


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = commands.add_parser(
        "schedule",
        help="run a pipeline again and again, at the times of a cron expression",
        epilog="The version is pinned: a later upload changes nothing. Missed times are not made up for. The times are"
        " of the server's time zone, which is UTC unless its CRON_SCHEDULE_TIMEZONE says otherwise.",
    )
    choosing.add_arguments(parser)
    choosing.add_run_arguments(parser)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--cron", metavar="'S M H D M W'", help="second minute hour day month weekday, as '0 0 2 * * 1'")
    what.add_argument("--remove", action="store_true", help="delete the schedule; runs that go on are left alone")
    parser.add_argument("--name", help="name of the schedule (the pipeline's)")
    parser.add_argument("--max-concurrency", metavar="N", type=int, default=1, help="runs at a time, 1 to 10 (1)")
    parser.add_argument("--replace", action="store_true", help="take the place of a schedule of this name")
    settings.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Create or delete the schedule; the same again changes nothing."""
    from datetime import UTC, datetime

    from pipelines.client.connection import Server
    from pipelines.client.cron import parse_cron
    from pipelines.client.schedules import MAX_CONCURRENCY, remove_schedules, schedule
    from pipelines.client.tables import when
    from pipelines.client.versions import upload
    from shellv_core.errors import ConfigError

    name = options.name or options.pipeline
    if options.remove:
        print(f"{name}: {remove_schedules(Server(settings.settings(options)), name) or 'no'} schedules deleted")
        return 0
    if not 1 <= options.max_concurrency <= MAX_CONCURRENCY:
        raise ConfigError(f"--max-concurrency is {options.max_concurrency}; allowed: 1 to {MAX_CONCURRENCY}.")
    cron = parse_cron(options.cron)
    pipeline = choosing.chosen(options)
    run_settings = choosing.run_settings(options, pipeline)
    server = Server(settings.settings(options))
    version = upload(server, pipeline)
    recurring, is_new = schedule(
        server, name, options.cron, version, run_settings, options.max_concurrency, options.replace
    )
    print(f"{name}: {'scheduled' if is_new else 'already scheduled'} as {options.cron!r}, version {version.name}")
    print(f"first time {when(cron.after(datetime.now(UTC)))} (if the server counts in UTC)")
    print(server.link(f"recurringrun/details/{recurring.recurring_run_id}"))
    return 0
