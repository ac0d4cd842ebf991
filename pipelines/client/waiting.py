"""Wait for a run and tell what happens; the run itself needs nobody to wait for it."""

from __future__ import annotations

import time
from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

from pipelines.client.connection import Server
from pipelines.client.errors import PipelineServerError
from pipelines.client.outcome import Outcome, outcome
from pipelines.client.runs import get_run, similar_run
from pipelines.client.tables import duration, moment, span
from pipelines.client.tasks import OVER, Task, tasks, titles_of

POLL_SECONDS = 10.0
#: A line at least so often, so that a person sees that we still watch.
HEARTBEAT_SECONDS = 300.0
#: How long a server may stay away.
PATIENCE_SECONDS = 1800.0


def attach(run_id: str) -> str:
    """The command that waits for a run."""
    return f"python -m pipelines wait {run_id}"


def wait(server: Server, run_id: str, timeout: float | None = None, show: Callable[[str], None] = print) -> Outcome:
    """Wait until a run ends, with a line for each change of a task; Ctrl-C ends the waiting and not the run.

    Args:
        timeout: seconds to wait at most; the run goes on after it.
        show: takes each line.

    Raises:
        PipelineServerError: if the server knows no such run, refuses us, or stays away for half an hour.
    """
    watch = _Watch(server, run_id, show)
    deadline = None if timeout is None else time.monotonic() + timeout
    try:
        while True:
            run = watch.look()
            ended = run and outcome(run.state, [each.state for each in run.state_history or ()])
            if ended is not None:
                watch.tell_end(run, ended)
                return ended
            if deadline is not None and time.monotonic() >= deadline:
                show(f"still running after {duration(timeout or 0)} of waiting; the run goes on: {attach(run_id)}")
                return Outcome.TIMED_OUT
            time.sleep(POLL_SECONDS)
    except KeyboardInterrupt:
        show(f"\nno longer waiting; the run goes on. Wait again: {attach(run_id)}")
        show(f"End it: python -m pipelines terminate {run_id}")
        return Outcome.INTERRUPTED


class _Watch:
    """What was seen of a run."""

    def __init__(self, server: Server, run_id: str, show: Callable[[str], None]) -> None:
        self.server, self.run_id, self.show = server, run_id, show
        self.states: dict[str, str] = {}
        self.titles: dict[str, str] = {}
        self.started: datetime | None = None
        self.expected: float | None = None
        self.away_since: float | None = None
        self.last_line = time.monotonic()

    def look(self) -> Any:
        """The run as it is now, after telling what changed; None while the server is away."""
        try:
            run = get_run(self.server, self.run_id)
        except PipelineServerError as error:
            self._away(error)
            return None
        if self.away_since is not None:
            self.away_since = None
            self._say("the server answers again")
        if self.started is None:
            self._begin(run)
        for task in tasks(run, self.titles):
            self._compare(task)
        if time.monotonic() - self.last_line >= HEARTBEAT_SECONDS:
            self._heartbeat(run)
        return run

    def tell_end(self, run: Any, ended: Outcome) -> None:
        """Say how the run ended, and why where it failed."""
        words = {
            Outcome.SUCCEEDED: "succeeded",
            Outcome.FAILED: "failed",
            Outcome.TERMINATED: "was terminated",
        }
        self._say(f"the run {words[ended]} after {span(run.created_at, run.finished_at)}")
        if ended is Outcome.FAILED:
            failed = [task for task in tasks(run, self.titles) if task.state == "FAILED"]
            for task in failed:
                self.show(f"  {task.name}: {task.message or 'the server tells no reason; its log does'}")
            if not failed and run.error:
                self.show(f"  {run.error.message}")
            self.show(f"  logs: {self.server.link(f'runs/details/{self.run_id}')}")

    def _away(self, error: PipelineServerError) -> None:
        now = time.monotonic()
        if error.unauthenticated and self.started is not None and self.away_since is None and self.server.renew():
            self.away_since = now  # a second refusal in a row is final
            return
        if not error.transient or (self.away_since is not None and now - self.away_since > PATIENCE_SECONDS):
            raise PipelineServerError(
                f"{error} The run goes on; wait again with `{attach(self.run_id)}`.", error.status, error.transient
            ) from None
        if self.away_since is None:
            self.away_since = now
            self._say(f"{error} The run goes on, and so does the waiting")

    def _begin(self, run: Any) -> None:
        self.started = moment(run.created_at) or datetime.now(UTC)
        try:
            self.titles = titles(self.server, run)
            before = similar_run(self.server, run)
        except PipelineServerError:
            return  # names and an estimate are a comfort, not worth an end of the waiting
        if before is not None and moment(before.finished_at):
            self.expected = (before.finished_at - before.created_at).total_seconds()
            self._say(f"an earlier run of this pipeline and preset took {duration(self.expected)}")

    def _compare(self, task: Task) -> None:
        if self.states.get(task.key) == task.state:
            return
        self.states[task.key] = task.state
        took = f" after {task.time}" if task.state in OVER and task.seconds is not None else ""
        self._say(f"{task.name}: {task.state.lower()}{took}")

    def _heartbeat(self, run: Any) -> None:
        seen = tasks(run, self.titles)
        over = sum(task.state in OVER for task in seen)
        running = ", ".join(f"{task.name} ({task.time})" for task in seen if task.state == "RUNNING") or "nothing"
        total = f" of {len(self.titles)}" if self.titles else ""
        left = self.expected - self._elapsed() if self.expected else 0.0
        estimate = f"; about {duration(left)} left if it takes as long as the earlier run" if left > 0 else ""
        self._say(f"{over}{total} tasks over, running: {running}{estimate}")

    def _elapsed(self) -> float:
        return max(0.0, (datetime.now(UTC) - self.started).total_seconds()) if self.started else 0.0

    def _say(self, text: str) -> None:
        self.last_line = time.monotonic()
        self.show(f"{duration(self._elapsed())}  {text}")


def titles(server: Server, run: Any) -> dict[str, str]:
    """What the pipeline of a run calls its tasks, by the names of their nodes; empty where the server does not tell."""
    if known := titles_of(run.pipeline_spec):
        return known
    reference = run.pipeline_version_reference
    if reference is None or not reference.pipeline_version_id:
        return {}
    with server.talking():
        version = server.client.pipelines.pipeline_service_get_pipeline_version(
            reference.pipeline_id, reference.pipeline_version_id
        )
    return titles_of(version.pipeline_spec)
