from __future__ import annotations

import io
import logging

import pytest

from pipelines.console import Console
from shellv_core.logs import setup_logging

TITLES = {"prepare-data": "prepare data", "finetune-2": "finetune without HACL"}
START = "06:06:45.047 - INFO - Executing task \x1b[96m'{}'\x1b[0m\n06:06:45.047 - INFO - Streamed logs:\n\n"
END = "\n\n06:06:45.794 - INFO - Task \x1b[96m'{}'\x1b[0m finished with status \x1b[92m{}\x1b[0m\n"
INPUT = """\
    [KFP Executor 2026-11-23 06:06:45,107 INFO]: Got executor_input:
    {
        "inputs": {
            "x": "}"
        }
    }
"""
TRACEBACK = """\
    Traceback (most recent call last):
      File "ephemeral_component.py", line 37, in prepare_data
    {error}
"""


def shown(*chunks: str) -> tuple[Console, str]:
    screen, log = io.StringIO(), io.StringIO()
    console = Console(screen, log, TITLES)
    for chunk in chunks:
        console.write(chunk)
    assert log.getvalue() == "".join(chunks)
    return console, screen.getvalue()


def test_a_task_shows_its_own_lines_only() -> None:
    text = "06:06:45.043 - INFO - Running pipeline: 'shellv'\n" + "-" * 80 + "\n"
    text += START.format("prepare-data") + INPUT + "    06:06:46 prepare_data: writing s3://shellv/x\n"
    text += "    Loading weights: 100%|███| 330/330\n    UserWarning: renamed\n"
    text += END.format("prepare-data", "SUCCESS") + "06:06:45.794 - INFO - Task outputs:\n    Output: 's3://shellv/x'\n"
    console, screen = shown(text)
    seconds = console.tasks[0].seconds
    assert screen == (
        f"[1/2] prepare data\n    06:06:46 prepare_data: writing s3://shellv/x\n    done in {seconds:.1f} s\n"
    )
    assert console.tasks[0].failure is None


def test_a_table_of_a_stage_is_shown_whole(capsys: pytest.CaptureFixture[str]) -> None:
    setup_logging()
    logging.getLogger("shellv_core.training.fit").info("finetune, part by part:\npart  rate\nprojector  0.001")
    said = capsys.readouterr().err
    text = START.format("finetune-2") + "".join(f"    {line}\n" for line in said.splitlines())
    text += "    x\n             another library's\n" + END.format("finetune-2", "SUCCESS")
    lines = shown(text)[1].splitlines()
    assert [line[13:] for line in lines[1:4]] == ["finetune, part by part:", "part  rate", "projector  0.001"]
    assert len(lines) == 5, "another library's lines are not"


def test_lines_may_come_in_pieces() -> None:
    text = START.format("finetune-2") + "    06:06:46 step 1\n" + END.format("finetune-2", "SUCCESS")
    assert shown(*text)[1].splitlines()[:2] == ["[1/2] finetune without HACL", "    06:06:46 step 1"]


def test_a_users_fault_is_its_message() -> None:
    error = TRACEBACK.format(error="shellv_core.errors.DataError: images: 'x.jpg' is broken. Mend it.")
    console, screen = shown(START.format("prepare-data") + error + END.format("prepare-data", "FAILURE"))
    assert console.tasks[0].failure == "images: 'x.jpg' is broken. Mend it."
    assert "Traceback" not in screen
    assert "failed after" in screen


def test_a_fault_in_the_code_is_its_traceback() -> None:
    error = TRACEBACK.format(error="ZeroDivisionError: division by zero")
    console, _ = shown(START.format("prepare-data") + error + END.format("prepare-data", "FAILURE"))
    failure = console.tasks[0].failure or ""
    assert failure.startswith("Traceback (most recent call last):")
    assert failure.endswith("ZeroDivisionError: division by zero")


def test_a_killed_task_says_so() -> None:
    console, _ = shown(START.format("prepare-data") + "    Killed\n" + END.format("prepare-data", "FAILURE"))
    assert "killed" in (console.tasks[0].failure or "")


def test_a_traceback_that_a_stage_survived_is_shown() -> None:
    error = TRACEBACK.format(error="OSError: no picture")
    console, screen = shown(START.format("prepare-data") + error + END.format("prepare-data", "SUCCESS"))
    assert "    OSError: no picture\n" in screen
    assert console.tasks[0].failure is None


def test_a_retried_task_keeps_its_number_and_only_its_last_try_counts() -> None:
    killed = START.format("prepare-data") + END.format("prepare-data", "FAILURE")
    retry = "06:06:45.795 - INFO - Task prepare-data failed (attempt 1/3). Retrying in 0.0s...\n"
    console, screen = shown(
        killed + retry, START.format("prepare-data") + END.format("prepare-data", "SUCCESS"), START.format("finetune-2")
    )
    assert [line for line in screen.splitlines() if line.startswith("[")] == [
        "[1/2] prepare data",
        "[1/2] prepare data, once more",
        "[2/2] finetune without HACL",
    ]
    assert [task.failure for task in console.tasks] == [None, None]
