"""Charts as inline SVG, so that a report is one file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 12, 28
_HEIGHT = 230
# Of bar charts: width, height of a bar and of a group's name, room for a value at the right.
_BAR_WIDTH, _BAR_HEIGHT, _BAR_NAME, _BAR_GAP, _BAR_VALUE = 340, 13, 18, 8, 38


@dataclass(frozen=True)
class Bar:
    """A share between 0 and 1, with its interval where there is one."""

    value: float
    low: float | None = None
    high: float | None = None


@dataclass(frozen=True)
class Series:
    """One bar for each group."""

    label: str
    color: str
    bars: Sequence[Bar]


def bar_chart(title: str, groups: Sequence[str], series: Sequence[Series], chance: float | None = None) -> str:
    """An SVG element: horizontal bars below each group's name, narrow enough for a phone, a dashed line at `chance`.

    The axis goes from 0 to 100 %, or further in steps of 25 where a bar does.
    """
    highest = max((bar.high or bar.value for each in series for bar in each.bars), default=1.0)
    top = max(1.0, math.ceil(highest * 4) / 4)
    pitch = _BAR_NAME + len(series) * _BAR_HEIGHT + _BAR_GAP
    bottom = len(groups) * pitch
    height = bottom + 20

    def x(share: float) -> float:
        return 6 + (_BAR_WIDTH - 6 - _BAR_VALUE) * share / top

    parts = [_open(title, _BAR_WIDTH, height)]
    for tick in range(round(4 * top) + 1):
        if top > 1 and tick % 2:
            continue
        across = x(tick / 4)
        parts.append(f'<line x1="{across:.1f}" x2="{across:.1f}" y1="0" y2="{bottom}" class="grid"/>')
        parts.append(f'<text x="{across:.1f}" y="{height - 5}" class="tick" text-anchor="middle">{25 * tick}</text>')
    for index, group in enumerate(groups):
        start = index * pitch + _BAR_NAME
        parts.append(f'<text x="6" y="{start - 4}" class="group">{escape(group)}</text>')
        for place, each in enumerate(series):
            down = start + place * _BAR_HEIGHT
            parts += _bar(down, each.bars[index], f"{each.label}, {group}", each.color, x)
    if chance is not None:
        parts.append(
            f'<line x1="{x(chance):.1f}" x2="{x(chance):.1f}" y1="0" y2="{bottom}" class="chance">'
            f"<title>chance {100 * chance:.0f} %</title></line>"
        )
    return "".join([*parts, "</svg>"])


@dataclass(frozen=True)
class Curve:
    """Values over steps, both of `points`' pairs; values that are not finite are left out."""

    label: str
    color: str
    points: Sequence[tuple[float, float]]


def line_chart(title: str, curves: Sequence[Curve], width: int = 520) -> str:
    """An SVG element: curves on one axis that spans their values, and on it from the first step to the last."""
    curves = [Curve(each.label, each.color, [p for p in each.points if math.isfinite(p[1])]) for each in curves]
    points = [point for each in curves for point in each.points]
    first, last = min((x for x, _ in points), default=0), max((x for x, _ in points), default=1)
    low, high = min((y for _, y in points), default=0), max((y for _, y in points), default=1)
    low, high = (low - 0.5, high + 0.5) if low == high else (low, high)
    left, plot = _LEFT + 24, _HEIGHT - _TOP - _BOTTOM

    def place(x: float, y: float) -> str:
        across = left + (width - left - _RIGHT) * (x - first) / max(last - first, 1e-9)
        return f"{across:.1f} {_TOP + plot * (high - y) / (high - low):.1f}"

    parts = [_open(title, width, _HEIGHT)]
    for tick in range(5):
        value = low + (high - low) * tick / 4
        height = _TOP + plot * (1 - tick / 4)
        parts.append(f'<line x1="{left}" x2="{width - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}" class="grid"/>')
        parts.append(f'<text x="{left - 6}" y="{height + 4:.1f}" class="tick" text-anchor="end">{value:.3g}</text>')
    for x, anchor in ((first, "start"), (last, "end")):
        place_x = place(x, low).partition(" ")[0]
        parts.append(f'<text x="{place_x}" y="{_HEIGHT - 9}" class="group" text-anchor="{anchor}">{x:g}</text>')
    for each in curves:
        path = "L".join(place(x, y) for x, y in each.points)
        name = f"<title>{escape(each.label)}</title>"
        if len(each.points) > 1:
            parts.append(f'<path d="M{path}" fill="none" stroke="{each.color}" stroke-width="1.6">{name}</path>')
        for x, y in each.points if len(each.points) == 1 else ():
            across, down = place(x, y).split()
            parts.append(f'<circle cx="{across}" cy="{down}" r="3" fill="{each.color}">{name}</circle>')
    return "".join([*parts, "</svg>"])


def _open(title: str, width: int, height: int) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"'
        f' aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
    )


def _bar(down: float, bar: Bar, label: str, color: str, x: Callable[[float], float]) -> list[str]:
    start, middle = x(0), down + _BAR_HEIGHT / 2
    width, height = max(x(bar.value) - start, 0.5), _BAR_HEIGHT - 2
    interval = "" if bar.low is None or bar.high is None else f" ({100 * bar.low:.1f} to {100 * bar.high:.1f})"
    # A style, as the color may be a variable of the page.
    parts = [
        f'<rect x="{start:.1f}" y="{down + 1:.1f}" width="{width:.1f}" height="{height}" rx="2"'
        f' style="fill:{color}"><title>{escape(label)}: {100 * bar.value:.1f} %{interval}</title></rect>'
    ]
    if bar.low is not None and bar.high is not None:
        low, high = x(bar.low), x(bar.high)
        parts.append(
            f'<path d="M{low:.1f} {middle - 3:.1f}v6M{low:.1f} {middle:.1f}H{high:.1f}M{high:.1f} {middle - 3:.1f}v6"'
            ' class="whisker"/>'
        )
    parts.append(
        f'<text x="{_BAR_WIDTH - 2}" y="{middle + 4:.1f}" class="tick" text-anchor="end">{100 * bar.value:.1f}</text>'
    )
    return parts
