"""A polite stop: SIGTERM (a node is taken away) and SIGUSR1 (a batch system's warning) end training after a step."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from types import FrameType

from shellv_core.training.processes import sums

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)


@dataclass
class StopRequest:
    """Name of the signal that asked this process to stop; empty while none has."""

    signal: str = ""


@contextlib.contextmanager
def stop_requests() -> Iterator[StopRequest]:
    """Note the first signal of each kind instead of dying of it; a second one has its usual effect at once.

    Only the main thread can take signals; in any other nothing is noted.
    """
    request = StopRequest()
    if threading.current_thread() is not threading.main_thread():
        yield request
        return
    seen: set[int] = set()

    def note(number: int, frame: FrameType | None) -> None:
        if number in seen:
            signal.signal(number, usual[number])
            os.kill(os.getpid(), number)
        seen.add(number)
        request.signal = signal.Signals(number).name

    usual = {int(number): signal.getsignal(number) or signal.SIG_DFL for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, note)
    try:
        yield request
    finally:
        for each, handler in usual.items():
            signal.signal(each, handler)


def should_stop(requested: bool) -> bool:
    """Whether the run stops after this step, the same in all its processes."""
    return sums([requested])[0] > 0
