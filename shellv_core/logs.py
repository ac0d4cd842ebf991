"""One logger for the library; the outermost program decides where its lines go."""

from __future__ import annotations

import logging
import sys
from collections.abc import Sequence

#: Before each further line of a message, as wide as the time before the first.
CONTINUATION = " " * 9


def get_logger(name: str) -> logging.Logger:
    """The logger of module `name` (pass ``__name__``)."""
    return logging.getLogger(name)


def setup_logging(level: int = logging.INFO) -> None:
    """Send the library's lines to standard error, with the time, and keep other libraries to warnings."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("shellv_core").setLevel(level)
    # It warns at import of an optional kernel that it would fetch from a hub.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


class _Formatter(logging.Formatter):
    def formatMessage(self, record: logging.LogRecord) -> str:
        return super().formatMessage(record).replace("\n", f"\n{CONTINUATION}")


def last_words(lines: Sequence[str], count: int = 15) -> str:
    """Of a ``shellv`` program's log: what it said of its failure, before any launcher's report, or else the end."""
    said = [line.removeprefix("shellv: ") for line in lines if line.startswith("shellv: ")]
    return said[0] if said else "\n" + "\n".join(list(lines)[-count:])
