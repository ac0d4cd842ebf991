"""Plain text: columns, durations and times."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import UTC, datetime


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, two blanks apart."""
    lines = [list(header), *(list(row) for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def duration(seconds: float) -> str:
    """As ``1:05:09`` (hours, minutes, seconds)."""
    whole = max(0, int(seconds))
    return f"{whole // 3600}:{whole // 60 % 60:02d}:{whole % 60:02d}"


def moment(value: datetime | None) -> datetime | None:
    """A time of the server, or None for the years 1 and 1970, by which it says that there is none yet."""
    return value if value is not None and value.year > 1970 else None


def span(start: datetime | None, end: datetime | None) -> str:
    """How long something has taken, or takes until now; a dash before it starts."""
    begin = moment(start)
    return duration(((moment(end) or datetime.now(UTC)) - begin).total_seconds()) if begin else "-"


def when(value: datetime | None) -> str:
    """As ``2026-11-26 20:26 UTC``; a dash for none."""
    there = moment(value)
    return f"{there.astimezone(UTC):%Y-%m-%d %H:%M} UTC" if there else "-"
