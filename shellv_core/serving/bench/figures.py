"""From answers to figures: percentiles, rates, and ratios of two servers with their intervals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from typing import Any

from shellv_core.serving.bench.client import OK, Answer, Load

PERCENTILES = (50, 90, 95, 99)
NUM_RESAMPLES = 2000
#: Figure -> its seconds of one answer.
DURATIONS: dict[str, Callable[[Answer], list[float]]] = {
    "first_token": lambda answer: [answer.pieces[0] - answer.due],
    "between_pieces": lambda answer: [after - before for before, after in zip(answer.pieces, answer.pieces[1:])],  # noqa: B905
    "per_token": lambda answer: (
        [(answer.pieces[-1] - answer.pieces[0]) / (answer.tokens - 1)] if answer.tokens > 1 else []
    ),
    "whole": lambda answer: [answer.ended - answer.due],
}


def figures_of(loads: Sequence[Load]) -> dict[str, Any]:
    """What the rounds on one server come to.

    Returns:
        ``requests``, ``by_status``, ``errors`` (the first message of each status), ``tokens``, ``tokens_per_second``
        and ``requests_per_second`` of whole answers over all rounds' time, for each of `DURATIONS` its percentiles and
        mean in seconds, and ``client``: what the measuring itself took.
    """
    import numpy as np

    answers = [answer for load in loads for answer in load.answers]
    whole = [answer for answer in answers if _counts(answer)]
    seconds = sum(load.seconds for load in loads)
    tokens = sum(answer.tokens for answer in whole)
    errors: dict[str, str] = {}
    for answer in answers:
        if answer.status != OK:
            errors.setdefault(answer.status, answer.message)
    lags = np.array([lag for load in loads for lag in load.lags] or [0.0])
    return {
        "requests": len(answers),
        "by_status": dict(sorted(Counter(answer.status for answer in answers).items())),
        "errors": errors,
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "requests_per_second": len(whole) / seconds,
        "rounds": [_rate(load) for load in loads],
        **{name: _spread([each for answer in whole for each in of(answer)]) for name, of in DURATIONS.items()},
        "client": {
            "cpu_share": sum(load.cpu_seconds for load in loads) / seconds,
            "cpu_seconds_per_request": sum(load.cpu_seconds for load in loads) / len(answers),
            "loop_lag_p50": float(np.quantile(lags, 0.5)),
            "loop_lag_p99": float(np.quantile(lags, 0.99)),
            "sent_late_p99": float(np.quantile([answer.sent - answer.due for answer in answers], 0.99)),
        },
    }


def compare(first: Sequence[Load], second: Sequence[Load], seed: int = 0) -> dict[str, dict[str, float]]:
    """Ratios of the first server to the second, each with a 95 % interval.

    Throughput is the geometric mean of the rounds' ratios, rounds resampled in pairs (with fewer than two, low and high
    are the value itself); durations are ratios of medians, requests resampled within each round; a median of 0, as
    where all text comes at once, has none.
    """
    import numpy as np

    rng = np.random.default_rng(seed)
    logs = np.log(
        [_rate(one) / _rate(other) for one, other in zip(first, second, strict=True) if _rate(one) > 0 < _rate(other)]
    )
    ratios = {}
    if len(logs):
        means = logs[rng.integers(len(logs), size=(NUM_RESAMPLES, len(logs)))].mean(axis=1)
        ratios["tokens_per_second"] = _interval(float(np.exp(logs.mean())), np.exp(means))
    for name, of in DURATIONS.items():
        sides = [_per_answer(loads, of) for loads in (first, second)]
        if not all(sum(map(len, side)) for side in sides):
            continue
        values = np.array(
            [[np.median(_drawn(side, rng if index else None)) for side in sides] for index in range(NUM_RESAMPLES + 1)]
        )
        if (values > 0).all():
            quotients = values[:, 0] / values[:, 1]
            ratios[f"{name}_p50"] = _interval(float(quotients[0]), quotients[1:])
    return ratios


def table(found: dict[str, dict[str, Any]], ratios: dict[str, dict[str, float]] | None = None) -> list[str]:
    """Lines for people: a column for each server."""
    width = max(12, *(len(name) + 2 for name in found))
    lines = [" " * 24 + "".join(f"{name:>{width}}" for name in found)]

    def row(label: str, cells: list[str]) -> None:
        lines.append(f"{label:24}" + "".join(f"{cell:>{width}}" for cell in cells))

    row("tokens/s", [f"{each['tokens_per_second']:.1f}" for each in found.values()])
    row("requests/s", [f"{each['requests_per_second']:.2f}" for each in found.values()])
    for name in DURATIONS:
        for percentile in PERCENTILES:
            label = f"{name.replace('_', ' ')} p{percentile}"
            row(label, [_seconds(each[name].get(f"p{percentile}")) for each in found.values()])
    row("answered", [f"{each['by_status'].get(OK, 0)}/{each['requests']}" for each in found.values()])
    for status in sorted({status for each in found.values() for status in each["by_status"]} - {OK}):
        row(f"  {status}", [str(each["by_status"].get(status, 0)) for each in found.values()])
    row("client: CPU", [f"{100 * each['client']['cpu_share']:.0f} %" for each in found.values()])
    row("client: loop lag p99", [_seconds(each["client"]["loop_lag_p99"]) for each in found.values()])
    if ratios:
        lines += ["", "first to second, with 95 % intervals"]
        for name, ratio in ratios.items():
            interval = f"[{ratio['low']:.2f}, {ratio['high']:.2f}]"
            lines.append(f"{name.replace('_', ' '):24}{ratio['ratio']:8.2f} {interval}")
    for each in found.values():
        lines += [f"{status}: {message}" for status, message in each["errors"].items() if message]
    return lines


def _counts(answer: Answer) -> bool:
    return answer.status == OK and bool(answer.pieces)


def _rate(load: Load) -> float:
    return sum(answer.tokens for answer in load.answers if _counts(answer)) / load.seconds


def _spread(seconds: list[float]) -> dict[str, float]:
    import numpy as np

    if not seconds:
        return {}
    quantiles = np.quantile(seconds, [each / 100 for each in PERCENTILES])
    return {f"p{each}": float(value) for each, value in zip(PERCENTILES, quantiles, strict=True)} | {
        "mean": float(np.mean(seconds))
    }


def _per_answer(loads: Sequence[Load], of: Callable[[Answer], list[float]]) -> list[list[float]]:
    """Of each round, one duration an answer: the median of its own where it has several."""
    import numpy as np

    return [
        [float(np.median(found)) for answer in load.answers if _counts(answer) and (found := of(answer))]
        for load in loads
    ]


def _drawn(rounds: list[list[float]], rng: Any) -> list[float]:
    if rng is None:
        return [each for values in rounds for each in values]
    return [values[index] for values in rounds if values for index in rng.integers(len(values), size=len(values))]


def _interval(value: float, resampled: Any) -> dict[str, float]:
    import numpy as np

    low, high = np.quantile(resampled, [0.025, 0.975])
    return {"ratio": value, "low": float(low), "high": float(high)}


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{1e3 * value:.0f} ms" if value < 10 else f"{value:.1f} s"
