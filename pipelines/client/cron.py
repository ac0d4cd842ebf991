"""Cron expressions of six fields, as the scheduler of Kubeflow Pipelines reads them (Go library robfig/cron v1)."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime, timedelta

from shellv_core.errors import ConfigError

MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
DAYS = ("sun", "mon", "tue", "wed", "thu", "fri", "sat")
#: Name, smallest and largest value, and names of the values from the smallest on.
FIELDS: tuple[tuple[str, int, int, tuple[str, ...]], ...] = (
    ("second", 0, 59, ()),
    ("minute", 0, 59, ()),
    ("hour", 0, 23, ()),
    ("day of the month", 1, 31, ()),
    ("month", 1, 12, MONTHS),
    ("day of the week", 0, 6, DAYS),
)
ANY = ("*", "?")
#: The Gregorian calendar holds every date within eight years.
MAX_DAYS = 8 * 366


@dataclass(frozen=True)
class Cron:
    """Values of each field, and whether the two day fields are restricted: then one of them suffices."""

    values: tuple[frozenset[int], ...]
    either_day: bool

    def after(self, moment: datetime) -> datetime | None:
        """The first time after `moment` (UTC); None if it never comes."""
        second, minute, hour, day, month, weekday = self.values
        start = moment.replace(microsecond=0) + timedelta(seconds=1)
        for offset in range(MAX_DAYS):
            date = (start + timedelta(days=offset)).replace(hour=0, minute=0, second=0)
            of_month, of_week = date.day in day, date.isoweekday() % 7 in weekday
            if date.month not in month or not (of_month or of_week if self.either_day else of_month and of_week):
                continue
            times = (date.replace(hour=h, minute=m, second=s) for h in sorted(hour) for m in sorted(minute)
                     for s in sorted(second))  # fmt: skip
            if found := next((each for each in times if each >= start), None):
                return found
        return None


def parse_cron(text: str) -> Cron:
    """Read a cron expression.

    Raises:
        ConfigError: if it has not six fields, a field holds something else or the time never comes.
    """
    fields = text.split()
    if len(fields) != len(FIELDS):
        hint = f"; with seconds first it is '0 {text}'" if len(fields) == len(FIELDS) - 1 else ""
        raise ConfigError(
            f"cron {text!r} has {len(fields)} fields; Kubeflow Pipelines takes six: second minute hour day month"
            f" weekday{hint}."
        )
    values = tuple(_field(part, *description) for part, description in zip(fields, FIELDS, strict=True))
    restricted = all(not part.startswith(ANY) for part in (fields[3], fields[5]))
    cron = Cron(values, either_day=restricted)
    if cron.after(datetime.now(UTC)) is None:
        raise ConfigError(f"cron {text!r}: this time never comes.")
    return cron


def _field(text: str, name: str, low: int, high: int, names: tuple[str, ...]) -> frozenset[int]:
    found: set[int] = set()
    for part in text.lower().split(","):
        span, slash, step = part.partition("/")
        first, dash, last = span.partition("-")
        try:
            begin = low if span in ANY else _value(first, low, names)
            end = high if span in ANY or (slash and not dash) else _value(last if dash else first, low, names)
            by = int(step) if slash else 1
        except ValueError:
            begin, end, by = 1, 0, 0
        if not low <= begin <= end <= high or by < 1:
            words = f" or {names[0]} to {names[-1]}" if names else ""
            raise ConfigError(
                f"cron: {part!r} is no {name}; allowed: {low} to {high}{words}, *, a-b, */n and lists with commas."
            )
        found.update(range(begin, end + 1, by))
    return frozenset(found)


def _value(text: str, low: int, names: tuple[str, ...]) -> int:
    return names.index(text) + low if text in names else int(text)
