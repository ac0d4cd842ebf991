"""Tables of what a server does: its runs and schedules, or the tasks of one run."""

from __future__ import annotations

from typing import Any

from pipelines.client.connection import Server
from pipelines.client.runs import get_run, latest_runs
from pipelines.client.schedules import cron_of, schedules
from pipelines.client.tables import span, table, when
from pipelines.client.tasks import tasks
from pipelines.client.waiting import titles


def of_server(server: Server, count: int) -> str:
    """The newest `count` runs and all schedules."""
    runs = latest_runs(server, count)
    rows = [
        (each.run_id, each.display_name, _state(each), when(each.created_at), span(each.created_at, each.finished_at))
        for each in runs
    ]
    text = table(("run", "name", "state", "started", "time"), rows) if rows else "no runs"
    recurring = schedules(server)
    if recurring:
        lines = [
            (each.display_name, cron_of(each) or "by interval", str(each.status or each.mode).lower(), each.description)
            for each in recurring
        ]
        text += "\n\n" + table(("schedule", "cron", "state", "what"), [tuple(cell or "-" for cell in x) for x in lines])
    return text


def of_run(server: Server, run_id: str) -> str:
    """The state of a run and of its tasks."""
    run = get_run(server, run_id)
    known = titles(server, run)
    rows = [(each.name, each.state.lower(), when(each.start), each.time) for each in tasks(run, known)]
    head = f"{run.display_name}: {_state(run)} after {span(run.created_at, run.finished_at)}"
    body = table(("task", "state", "started", "time"), rows) if rows else "no task has begun"
    reasons = [f"{each.name}: {each.message}" for each in tasks(run, known) if each.message]
    if run.error and run.error.message:
        reasons.append(f"run: {run.error.message}")
    return "\n".join([head, server.link(f"runs/details/{run_id}"), "", body, *([""] if reasons else []), *reasons])


def _state(run: Any) -> str:
    return str(run.state or "pending").lower()
