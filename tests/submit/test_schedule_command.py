from __future__ import annotations

from datetime import UTC, datetime

import pytest

from pipelines.client.cron import parse_cron
from shellv_core.errors import ConfigError
from tests.pipelines.kfp_api_server import KfpServer
from tests.submit.conftest import ROOT, Command

NIGHTLY = "0 30 2 * * *"


def test_a_schedule_pins_the_version_and_does_not_catch_up(kfp: KfpServer, command: Command) -> None:
    said = command("schedule", "shellv", ROOT, "--cron", NIGHTLY, "--max-concurrency", "2", "--no-cache")
    assert said.code == 0, said.err
    (entry,) = kfp.recurring.values()
    (version,) = kfp.versions.values()
    assert entry["display_name"] == "shellv"
    assert entry["trigger"] == {"cron_schedule": {"cron": NIGHTLY}}
    assert entry["no_catchup"] is True
    assert entry["max_concurrency"] == "2"
    assert entry["mode"] == "ENABLE"
    assert entry["pipeline_version_reference"]["pipeline_version_id"] == version["pipeline_version_id"]
    assert entry["runtime_config"]["parameters"]["root_uri"] == "s3://bucket/prefix"
    assert f"shellv: scheduled as '{NIGHTLY}', version {version['name']}" in said.out
    assert f"/#/recurringrun/details/{entry['recurring_run_id']}" in said.out
    table = command("status").out
    assert NIGHTLY in table
    assert "enabled" in table


def test_the_same_schedule_again_changes_nothing_and_another_needs_replace(kfp: KfpServer, command: Command) -> None:
    assert command("schedule", "shellv", ROOT, "--cron", NIGHTLY).code == 0
    first = list(kfp.recurring)
    assert "already scheduled" in command("schedule", "shellv", ROOT, "--cron", NIGHTLY).out
    for arguments in (["--cron", "0 0 3 * * *"], ["--cron", NIGHTLY, "--max-concurrency", "3"]):
        other = command("schedule", "shellv", ROOT, *arguments)
        assert other.code == 2
        assert "--replace takes its place" in other.err
        assert list(kfp.recurring) == first
    assert command("schedule", "shellv", ROOT, "--cron", "0 0 3 * * *", "--replace").code == 0
    (entry,) = kfp.recurring.values()
    assert entry["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * *"
    assert command("schedule", "shellv", ROOT, "--cron", NIGHTLY, "--name", "nightly").code == 0
    assert len(kfp.recurring) == 2
    assert command("schedule", "shellv", "--remove").out == "shellv: 1 schedules deleted\n"
    assert command("schedule", "shellv", "--remove").out == "shellv: no schedules deleted\n"
    assert [each["display_name"] for each in kfp.recurring.values()] == ["nightly"]


def test_a_schedule_whose_answer_is_lost_is_there_once(kfp: KfpServer, command: Command) -> None:
    kfp.fail("POST", "/recurringruns", 0, after=True)
    assert command("schedule", "shellv", ROOT, "--cron", NIGHTLY).code == 0
    assert len(kfp.recurring) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--cron", "30 2 * * *"], "has 5 fields; Kubeflow Pipelines takes six: second minute hour day month weekday;"),
        (["--cron", "30 2 * * *"], "with seconds first it is '0 30 2 * * *'"),
        (["--cron", "@daily"], "cron '@daily' has 1 fields"),
        (["--cron", "0 0 24 * * *"], "cron: '24' is no hour; allowed: 0 to 23"),
        (["--cron", "0 0 2 * * 7"], "cron: '7' is no day of the week; allowed: 0 to 6 or sun to sat"),
        (["--cron", "0 0 2 30 feb *"], "this time never comes"),
        (["--cron", NIGHTLY, "--max-concurrency", "11"], "--max-concurrency is 11; allowed: 1 to 10."),
    ],
)
def test_wrong_settings_are_told_before_any_request(
    kfp: KfpServer, command: Command, arguments: list[str], message: str
) -> None:
    said = command("schedule", "shellv", ROOT, *arguments)
    assert said.code == 2
    assert message in said.err
    assert kfp.requests == []


# 2026-11-26 is a Thursday.
NOW = datetime(2026, 11, 26, 20, 26, 10, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("* * * * * *", "2026-11-26 20:26:11"),
        ("0 30 2 * * *", "2026-11-27 02:30:00"),
        ("0 0 */6 * * *", "2026-11-27 00:00:00"),
        ("15,45 26 20 26 NOV ?", "2026-11-26 20:26:15"),
        ("0 0 9 ? * 2-6", "2026-11-27 09:00:00"),
        ("0 0 9 ? * Mon", "2026-11-30 09:00:00"),
        ("0 0 0 29 feb *", "2028-02-29 00:00:00"),
        ("0 10/20 20 * * *", "2026-11-26 20:30:00"),
        # Both day fields restricted: either is enough, as in Unix's cron.
        ("0 0 0 28 * sun", "2026-11-28 00:00:00"),
        ("0 0 0 1 * sun", "2026-11-29 00:00:00"),
    ],
)
def test_the_next_time(text: str, expected: str) -> None:
    assert f"{parse_cron(text).after(NOW):%Y-%m-%d %H:%M:%S}" == expected


@pytest.mark.parametrize(
    "text", ["0 0 0 0 * *", "0 0 0 1 13 *", "0 0 5-1 * * *", "0 */0 * * * *", "0 x * * * *", "0 1-2-3 * * * *"]
)
def test_what_is_no_cron_expression(text: str) -> None:
    with pytest.raises(ConfigError, match="cron"):
        parse_cron(text)
