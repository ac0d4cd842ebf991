"""Progress with an ETA: a bar on a terminal, a log line every few seconds elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from collections.abc import Iterable, Iterator, Sized
from types import TracebackType
from typing import Any, TypeVar

from shellv_core.logs import get_logger

logger = get_logger(__name__)
T = TypeVar("T")
LOG_INTERVAL_SECONDS = 10.0


class Progress:
    """A counter up to `total` (None where unknown) that reports itself.

    Use it as a context manager and call `update` after each piece of work.
    """

    def __init__(self, total: int | None = None, description: str = "", unit: str = "it", initial: int = 0) -> None:
        self.total, self.description, self.unit = total, description, unit
        self.count = self.initial = initial
        self._start = self._last_line = time.monotonic()
        self._bar: Any = None
        if sys.stderr.isatty() and logger.isEnabledFor(logging.INFO):
            from tqdm import tqdm

            self._bar = tqdm(total=total, desc=description, unit=unit, initial=initial, leave=False)

    def update(self, n: int = 1, **postfix: float) -> None:
        """Count `n` more; `postfix` values (losses, rates) are shown beside the count."""
        self.count += n
        if self._bar is not None:
            if postfix:
                self._bar.set_postfix({key: f"{value:.4g}" for key, value in postfix.items()}, refresh=False)
            self._bar.update(n)
            return
        now = time.monotonic()
        if now - self._last_line >= LOG_INTERVAL_SECONDS:
            self._last_line = now
            logger.info(self._line(now, postfix))

    def _line(self, now: float, postfix: dict[str, float]) -> str:
        rate = (self.count - self.initial) / max(now - self._start, 1e-9)
        values = "".join(f", {key} {value:.4g}" for key, value in postfix.items())
        if self.total is None:
            return f"{self.description}: {self.count} {self.unit}, {rate:.1f}/s{values}"
        eta = (self.total - self.count) / rate if rate > 0 else float("inf")
        return (
            f"{self.description}: {self.count}/{self.total} {self.unit}"
            f" ({100 * self.count / max(self.total, 1):.0f}%), {rate:.1f}/s, ETA {eta:.0f} s{values}"
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.close()


def progress(iterable: Iterable[T], total: int | None = None, description: str = "", unit: str = "it") -> Iterator[T]:
    """Yield from `iterable` and report how far it is; `total` defaults to its length where it has one."""
    if total is None and isinstance(iterable, Sized):
        total = len(iterable)
    with Progress(total, description, unit) as counter:
        for item in iterable:
            yield item
            counter.update()
