"""SIGTERM, with which Kubernetes ends a pod, as an exception that leaves nothing behind."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType

from shellv_core.errors import Preempted


@contextlib.contextmanager
def sigterm_raises(message: str) -> Iterator[None]:
    """Within it SIGTERM raises `Preempted`, in the main thread alone, which takes signals."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        # A second request must not cut the cleaning up off; who cannot wait kills.
        signal.signal(number, signal.SIG_IGN)
        raise Preempted(message)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
