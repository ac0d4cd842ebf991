"""Recurring runs: a pinned version of a pipeline at the times of a cron expression."""

from __future__ import annotations

from typing import Any

from pipelines.client.connection import Server
from pipelines.client.runs import RunSettings
from pipelines.client.versions import UploadedVersion, named
from shellv_core.errors import ConfigError

MAX_CONCURRENCY = 10  # the server's own bound


def schedules(server: Server, name: str | None = None) -> list[Any]:
    """The server's recurring runs, or those called `name`."""
    arguments: dict[str, Any] = {"filter": named(name)} if name else {}
    if server.namespace:
        arguments["namespace"] = server.namespace
    listing = server.client.recurring_runs.recurring_run_service_list_recurring_runs
    return list(server.pages(listing, "recurring_runs", **arguments))


def schedule(
    server: Server,
    name: str,
    cron: str,
    version: UploadedVersion,
    settings: RunSettings,
    max_concurrency: int = 1,
    replace: bool = False,
) -> tuple[Any, bool]:
    """Run `version` at the times of `cron`; missed times are not made up for.

    Args:
        max_concurrency: how many of its runs may go on at the same time, 1 to 10.
        replace: whether a schedule of this name and other content gives way.

    Returns:
        The recurring run, and whether it is new: the same under the same name stays as it is.

    Raises:
        ConfigError: if the name is taken by another content and `replace` is not given.
        PipelineServerError: if the server refuses or does not answer.
    """
    import kfp_server_api

    wanted = kfp_server_api.V2beta1RecurringRun(
        display_name=name,
        description=f"version {version.name}",
        mode=kfp_server_api.RecurringRunMode.ENABLE,
        trigger=kfp_server_api.V2beta1Trigger(cron_schedule=kfp_server_api.V2beta1CronSchedule(cron=cron)),
        max_concurrency=str(max_concurrency),
        no_catchup=True,
        **settings.fields(server, version),
    )
    before = schedules(server, name)
    same = next((each for each in before if _content(each) == _content(wanted)), None)
    if same is not None:
        return same, False
    if before and not replace:
        raise ConfigError(
            f"schedule {name!r} exists with other content (cron {cron_of(before[0])!r},"
            f" {before[0].description or 'unknown version'}): --replace takes its place, or choose another --name."
        )
    known = {each.recurring_run_id for each in before}
    created = server.once(
        lambda: server.client.recurring_runs.recurring_run_service_create_recurring_run(wanted),
        lambda: next((each for each in schedules(server, name) if each.recurring_run_id not in known), None),
    )
    for each in before:
        _remove(server, each)
    return created, True


def remove_schedules(server: Server, name: str) -> int:
    """Delete the recurring runs called `name`; returns how many there were. Runs that go on are left alone."""
    found = schedules(server, name)
    for each in found:
        _remove(server, each)
    return len(found)


def cron_of(recurring: Any) -> str:
    """The cron expression of a recurring run; empty for one that runs by intervals."""
    trigger = recurring.trigger
    return str(trigger.cron_schedule.cron) if trigger and trigger.cron_schedule else ""


def _remove(server: Server, recurring: Any) -> None:
    with server.talking():
        server.client.recurring_runs.recurring_run_service_delete_recurring_run(recurring.recurring_run_id)


def _content(recurring: Any) -> tuple[Any, ...]:
    config, version = recurring.runtime_config, recurring.pipeline_version_reference
    return (
        cron_of(recurring),
        str(recurring.max_concurrency),
        bool(recurring.no_catchup),
        version.pipeline_version_id if version else None,
        (config.parameters or {}) if config else {},
        (config.pipeline_root or "") if config else "",
        recurring.service_account or "",
        recurring.experiment_id,
        recurring.plugins_input or {},
    )
