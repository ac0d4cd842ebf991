"""How a run ended, as an exit code."""

from __future__ import annotations

from collections.abc import Iterable
from enum import IntEnum

#: States in which nothing more happens.
FINAL_STATES = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")


class Outcome(IntEnum):
    """Exit codes of ``submit --wait`` and ``wait``; 1 and 2 are faults of the command itself."""

    SUCCEEDED = 0
    FAILED = 3
    TIMED_OUT = 4
    TERMINATED = 5
    INTERRUPTED = 130


def outcome(state: str, history: Iterable[str]) -> Outcome | None:
    """How a run ended that is in `state` and was in the states of `history`; None while it goes on.

    A server may report a terminated run's workflow as failed in the end.
    """
    if state not in FINAL_STATES:
        return None
    if state in ("SUCCEEDED", "SKIPPED"):
        return Outcome.SUCCEEDED
    return Outcome.TERMINATED if state == "CANCELED" or "CANCELING" in history else Outcome.FAILED
