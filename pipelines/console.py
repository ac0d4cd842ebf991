"""What a person sees of a local run: the stages' own lines, without those of `kfp.local` and of other libraries."""

from __future__ import annotations

import io
import re
import time
from dataclasses import dataclass, field
from typing import TextIO

from shellv_core.logs import CONTINUATION

TASK_STARTS = re.compile(r"^\S+ - INFO - Executing task \S*'([^']+)'")
TASK_ENDS = re.compile(r"^\S+ - \w+ - Task \S*'([^']+)'\S* finished with status \S*?(SUCCESS|FAILURE)")
STAGE_ERROR = re.compile(r"^shellv_core\.errors\.\w+: ")
OWN_LINE = re.compile(r"^\d\d:\d\d:\d\d ")
INDENT = "    "


@dataclass
class Task:
    """One task of the run, `seconds` of wall-clock time."""

    name: str
    started: float
    seconds: float = 0.0
    failure: str | None = None
    traceback: list[str] = field(default_factory=list)


class Console(io.TextIOBase):
    """Standard output for `kfp.local`: keeps everything in a log file and shows the essential.

    Args:
        screen: where the essential goes.
        log: where everything goes.
        titles: what to call each task, by kfp's name of it.
    """

    def __init__(self, screen: TextIO, log: TextIO, titles: dict[str, str]) -> None:
        self.tasks: list[Task] = []
        self._screen, self._log, self._titles = screen, log, titles
        self._line = ""
        self._running: Task | None = None
        self._skipping_until: str | None = None
        self._in_own_message = False

    def writable(self) -> bool:
        """Whether text can be written: yes."""
        return True

    def write(self, text: str) -> int:
        """Take text as it comes; whole lines are dealt with."""
        self._log.write(text)
        *lines, self._line = (self._line + text).split("\n")
        for line in lines:
            self._take(line)
        return len(text)

    def flush(self) -> None:
        """Pass on what is buffered."""
        self._log.flush()
        self._screen.flush()

    def show(self, line: str) -> None:
        """Write a line on the screen."""
        # kfp.local replaces `print` while a task runs.
        self._screen.write(line + "\n")
        self._screen.flush()

    def _take(self, line: str) -> None:
        if started := TASK_STARTS.match(line):
            self._start(self._titles.get(started[1], started[1]))
        elif self._running is None:
            return
        elif ended := TASK_ENDS.match(line):
            self._end(self._running, failed=ended[2] == "FAILURE")
        elif line.startswith(INDENT):
            self._take_task_line(self._running, line.removeprefix(INDENT))

    def _start(self, name: str) -> None:
        previous = self.tasks.pop() if self.tasks and self.tasks[-1].failure and self.tasks[-1].name == name else None
        self._running = Task(name, previous.started if previous else time.monotonic())
        self.tasks.append(self._running)
        again = ", once more" if previous else ""
        self.show(f"[{len(self.tasks)}/{len(self._titles)}] {name}{again}")

    def _take_task_line(self, task: Task, line: str) -> None:
        continued = self._in_own_message and line.startswith(CONTINUATION)
        self._in_own_message = continued or OWN_LINE.match(line) is not None
        if self._skipping_until is not None:
            if line == self._skipping_until:
                self._skipping_until = None
        elif line.startswith("[KFP Executor"):
            # kfp prints the task's whole input as indented JSON after this line.
            if line.endswith("Got executor_input:"):
                self._skipping_until = "}"
        elif task.traceback or line.startswith("Traceback (most recent call last)"):
            task.traceback.append(line)
        elif self._in_own_message:
            # Other libraries' bars and warnings are for the log file.
            self.show(INDENT + line)

    def _end(self, task: Task, failed: bool) -> None:
        task.seconds = time.monotonic() - task.started
        self._running = None
        if failed:
            task.failure = _failure(task.traceback)
            self.show(f"{INDENT}failed after {task.seconds:.1f} s")
            return
        for line in task.traceback:
            self.show(INDENT + line)
        self.show(f"{INDENT}done in {task.seconds:.1f} s")


def _failure(traceback: list[str]) -> str:
    """The stage's own message, the whole traceback of a fault in the code, or what is known of a killed task."""
    for index in reversed(range(len(traceback))):
        if STAGE_ERROR.match(traceback[index]):
            return "\n".join([STAGE_ERROR.sub("", traceback[index]), *traceback[index + 1 :]]).strip()
    return "\n".join(traceback).strip() or "it ended without a message: killed, or the machine ran out of memory."
