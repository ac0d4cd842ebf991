"""Charts as inline SVG, so that a report is one file that needs nothing else."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape

_LEFT, _RIGHT, _TOP, _BOTTOM = 40, 8, 12, 28
_HEIGHT = 230


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
    """An SVG element: groups of bars on an axis from 0 to 100 %, a dashed line at `chance`."""
    bar_width, gap = 15, 18
    group_width = bar_width * len(series)
    width = _LEFT + _RIGHT + len(groups) * (group_width + gap)
    plot = _HEIGHT - _TOP - _BOTTOM

    def y(share: float) -> float:
        return _TOP + plot * (1 - share)

    parts = [
        f'<svg viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}" role="img"'
        f' aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
    ]
    for tick in (0, 25, 50, 75, 100):
        height = y(tick / 100)
        parts.append(f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{height:.1f}" y2="{height:.1f}" class="grid"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{height + 4:.1f}" class="tick" text-anchor="end">{tick}</text>')
    for index, group in enumerate(groups):
        start = _LEFT + gap / 2 + index * (group_width + gap)
        for place, each in enumerate(series):
            parts += _bar(
                start + place * bar_width, bar_width, each.bars[index], f"{each.label}, {group}", each.color, y
            )
        center = start + group_width / 2
        parts.append(
            f'<text x="{center:.1f}" y="{_HEIGHT - 9}" class="group" text-anchor="middle">{escape(group)}</text>'
        )
    if chance is not None:
        parts.append(
            f'<line x1="{_LEFT}" x2="{width - _RIGHT}" y1="{y(chance):.1f}" y2="{y(chance):.1f}" class="chance">'
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

    parts = [
        f'<svg viewBox="0 0 {width} {_HEIGHT}" width="{width}" height="{_HEIGHT}" role="img"'
        f' aria-label="{escape(title)}" xmlns="http://www.w3.org/2000/svg">'
    ]
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


def _bar(left: float, width: int, bar: Bar, label: str, color: str, y: Callable[[float], float]) -> list[str]:
    top = y(bar.value)
    interval = "" if bar.low is None or bar.high is None else f" ({100 * bar.low:.1f} to {100 * bar.high:.1f})"
    parts = [
        f'<rect x="{left + 1:.1f}" y="{top:.1f}" width="{width - 2}" height="{max(y(0) - top, 0.5):.1f}" rx="2"'
        f' fill="{color}"><title>{escape(label)}: {100 * bar.value:.1f} %{interval}</title></rect>'
    ]
    if bar.low is not None and bar.high is not None:
        center = left + width / 2
        parts.append(
            f'<path d="M{center - 3:.1f} {y(bar.high):.1f}h6M{center:.1f} {y(bar.high):.1f}V{y(bar.low):.1f}'
            f'M{center - 3:.1f} {y(bar.low):.1f}h6" class="whisker"/>'
        )
    return parts
