from __future__ import annotations

import _thread
import re

import pytest

from pipelines.client import waiting
from tests.pipelines.kfp_api_server import KfpServer, Snapshot
from tests.submit.conftest import ROOT, Command, Said


def start(kfp: KfpServer, command: Command, *script: Snapshot, arguments: tuple[str, ...] = ()) -> str:
    """Submit a run that goes through `script`; returns its id."""
    kfp.script = list(script)
    known = set(kfp.runs)
    assert command("submit", "shellv", ROOT, *arguments).code == 0
    (run_id,) = set(kfp.runs) - known
    return run_id


def lines(said: Said) -> list[str]:
    """What a wait told, without the time that has passed."""
    return [line.split("  ", 1)[1] if line[:1].isdigit() else line for line in said.out.splitlines()]


RUNNING = Snapshot("RUNNING", {"prepare-data": "RUNNING"})
DONE = Snapshot("SUCCEEDED", {"prepare-data": "SUCCEEDED"})


def test_each_change_of_a_task_is_a_line(kfp: KfpServer, command: Command) -> None:
    run_id = start(
        kfp,
        command,
        Snapshot("PENDING"),
        Snapshot("RUNNING", {"prepare-data": "PENDING"}),
        RUNNING,
        RUNNING,
        Snapshot("RUNNING", {"prepare-data": "SUCCEEDED", "finetune": "RUNNING", "finetune-2": "RUNNING"}),
        Snapshot("SUCCEEDED", {"finetune": "SUCCEEDED", "finetune-2": "SKIPPED"}),
    )
    said = command("wait", run_id)
    assert said.code == 0
    told = [line.split(" after")[0] for line in lines(said)]
    assert told == [
        "prepare data: pending",
        "prepare data: running",
        "prepare data: succeeded",
        "finetune with HACL: running",
        "finetune without HACL: running",
        "finetune with HACL: succeeded",
        "finetune without HACL: skipped",
        "the run succeeded",
    ]


def test_a_failed_run_names_its_task_and_the_reason(kfp: KfpServer, command: Command) -> None:
    run_id = start(
        kfp,
        command,
        Snapshot("FAILED", {"finetune": "FAILED", "deploy": "FAILED"}, {"deploy": "driver: no such config map"}),
    )
    said = command("wait", run_id)
    assert said.code == 3
    assert lines(said)[-4].startswith("the run failed after")
    assert said.out.splitlines()[-3:] == [
        "  finetune with HACL: the server tells no reason; its log does",
        "  deploy: driver: no such config map",
        f"  logs: {kfp.url}/#/runs/details/{run_id}",
    ]


def test_a_run_that_takes_longer_than_the_timeout_goes_on(kfp: KfpServer, command: Command) -> None:
    run_id = start(kfp, command, RUNNING)
    said = command("wait", run_id, "--timeout", "0")
    assert said.code == 4
    assert f"the run goes on: python -m pipelines wait {run_id}" in said.out
    assert kfp.runs[run_id]["state"] == "RUNNING"


def test_terminate_ends_a_run_once_and_its_wait_says_so(kfp: KfpServer, command: Command) -> None:
    run_id = start(kfp, command, RUNNING)
    command("status", run_id)
    assert command("terminate", run_id).out == f"run {run_id} is being terminated\n"
    assert command("terminate", run_id).code == 0
    said = command("wait", run_id)
    assert said.code == 5
    assert "the run was terminated" in said.out
    again = command("terminate", run_id)
    assert (again.code, again.out) == (0, f"run {run_id} has ended before: failed\n")
    assert kfp.count("POST", ":terminate") == 1


@pytest.mark.parametrize("after", [True, False])
def test_terminate_is_repeated_where_its_answer_is_lost(kfp: KfpServer, command: Command, after: bool) -> None:
    run_id = start(kfp, command, RUNNING)
    kfp.fail("POST", ":terminate", 0, after=after)
    assert command("terminate", run_id).code == 0
    assert command("wait", run_id).code == 5


@pytest.mark.parametrize("name", ["wait", "terminate", "status"])
def test_a_run_that_does_not_exist(kfp: KfpServer, command: Command, name: str) -> None:
    said = command(name, "no-such-run")
    assert said.code == 1
    assert "does not know this (404:" in said.err
    assert "run no-such-run not found" in said.err
    assert said.err.count("\n") == 1


@pytest.mark.parametrize("status", [0, 502])
def test_a_server_that_stays_away_is_waited_for(kfp: KfpServer, command: Command, status: int) -> None:
    run_id = start(kfp, command, RUNNING)
    kfp.scripts[run_id] = [
        Snapshot("RUNNING", then=lambda: kfp.fail("GET", f"/runs/{run_id}", status, count=6)),
        Snapshot("RUNNING"),
        DONE,
    ]
    said = command("wait", run_id)
    assert said.code == 0, said.err
    assert said.out.count("The run goes on, and so does the waiting") == 1
    assert said.out.count("the server answers again") == 1


def test_patience_has_an_end(kfp: KfpServer, command: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(waiting, "PATIENCE_SECONDS", -1.0)
    run_id = start(kfp, command, RUNNING)
    kfp.fail("GET", f"/runs/{run_id}", 502, count=1000)
    said = command("wait", run_id)
    assert said.code == 1
    assert f"The run goes on; wait again with `python -m pipelines wait {run_id}`." in said.err


def test_a_token_that_expires_says_how_to_go_on(kfp: KfpServer, command: Command) -> None:
    run_id = start(kfp, command, RUNNING)

    def expire() -> None:
        kfp.token = "another"

    kfp.scripts[run_id] = [Snapshot("RUNNING", then=expire)]
    said = command("wait", run_id)
    assert said.code == 1
    assert "does not accept these credentials (401:" in said.err
    assert f"The run goes on; wait again with `python -m pipelines wait {run_id}`." in said.err


def test_ctrl_c_ends_the_waiting_and_not_the_run(kfp: KfpServer, command: Command) -> None:
    run_id = start(kfp, command, RUNNING)
    kfp.scripts[run_id] = [RUNNING, Snapshot("RUNNING", then=_thread.interrupt_main), RUNNING]
    said = command("wait", run_id)
    assert said.code == 130
    assert f"the run goes on. Wait again: python -m pipelines wait {run_id}" in said.out
    assert kfp.runs[run_id]["state"] == "RUNNING"
    assert kfp.count("POST", ":terminate") == 0


def test_an_earlier_run_of_the_same_preset_gives_the_estimate(
    kfp: KfpServer, command: Command, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(waiting, "HEARTBEAT_SECONDS", 0.0)
    assert command("wait", start(kfp, command, RUNNING, DONE)).code == 0
    other = command("wait", start(kfp, command, RUNNING, DONE, arguments=("preset=smoke",)))
    assert "an earlier run" not in other.out
    assert "left" not in other.out
    same = command("wait", start(kfp, command, RUNNING, RUNNING, DONE))
    assert "an earlier run of this pipeline and preset took 0:00:" in same.out
    assert re.search(r"0 of \d\d tasks over, running: prepare data \(0:00:\d\d\); about 0:00:\d\d left", same.out)


def test_status_lists_runs_and_the_tasks_of_one(kfp: KfpServer, command: Command) -> None:
    assert command("status").out == "no runs\n"
    first = start(kfp, command, DONE)
    command("wait", first)
    second = start(kfp, command, Snapshot("FAILED", {"finetune": "FAILED"}, {"finetune": "out of memory"}))
    command("wait", second)
    head, *rows = command("status").out.splitlines()
    assert head.split() == ["run", "name", "state", "started", "time"]
    assert [row.split()[0] for row in rows] == [second, first]
    assert ["failed" in rows[0], "succeeded" in rows[1]] == [True, True]
    assert len(command("status", "--count", "1").out.splitlines()) == 2
    assert "--count is 0; it must be 1 or more." in command("status", "--count", "0").err
    out = command("status", second).out
    assert "finetune with HACL  failed" in out
    assert out.splitlines()[-1] == "finetune with HACL: out of memory"
