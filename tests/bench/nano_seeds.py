"""The table of the nano preset over several seeds: with and without HACL, each beside its blind run.

    python -m tests.bench.nano_seeds --seeds 0 1 2 --output docs/nano-seeds

Each seed is one run of the whole pipeline, data included, so the spread is over data, weights and order. Written are
OUTPUT.json (every figure of every seed) and OUTPUT.md (means with 95 % t-intervals).
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from scipy import stats

POPE = ("random", "popular", "adversarial")
HAL_EVAL = ("object", "attribute", "relation", "event")
COLUMNS = [
    *((f"POPE {split}", ("pope", split, "accuracy")) for split in POPE),
    ("yes ratio", ("pope", "random", "yes_ratio")),
    *((f"Hal-Eval {kind}", ("hal_eval", kind, "accuracy")) for kind in HAL_EVAL),
    ("CHAIR i", ("chair", "instance_rate")),
    ("CHAIR s", ("chair", "sentence_rate")),
    ("recall", ("chair", "recall")),
]
ROWS = {
    "with HACL": ("candidate", ""),
    "with HACL, blind": ("candidate", "_blind"),
    "without HACL": ("without_hacl", ""),
    "without HACL, blind": ("without_hacl", "_blind"),
}


def figure(results: Mapping[str, Any], row: str, path: Sequence[str]) -> float:
    """One figure of one run's ``results.json``, in percent."""
    model, suffix = ROWS[row]
    value: Any = results["models"][model][path[0] + suffix]
    for key in path[1:]:
        value = value[key]
    return 100 * float(value)


def interval(values: Sequence[float]) -> tuple[float, float]:
    """Mean and half-width of the 95 % t-interval."""
    if len(values) < 2:
        return values[0], math.nan
    half = stats.t.ppf(0.975, len(values) - 1) * statistics.stdev(values) / math.sqrt(len(values))
    return statistics.mean(values), float(half)


def table(runs: Mapping[int, Mapping[str, Any]]) -> str:
    """Markdown: means with intervals, then the differences that the project claims, seed by seed."""
    lines = ["| model | " + " | ".join(name for name, _ in COLUMNS) + " |", "|---" * (len(COLUMNS) + 1) + "|"]
    for row in ROWS:
        cells = []
        for _, path in COLUMNS:
            mean, half = interval([figure(results, row, path) for results in runs.values()])
            cells.append(f"{mean:.1f} ± {half:.1f}")
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    lines += ["", "Differences in points, seed by seed, then their mean with its 95 % interval:", ""]
    lines += [
        "| difference | " + " | ".join(f"seed {seed}" for seed in runs) + " | mean |",
        "|---" * (len(runs) + 2) + "|",
    ]
    claims = [(f"POPE {split}", ("pope", split, "accuracy")) for split in POPE] + [
        ("CHAIR i", ("chair", "instance_rate"))
    ]
    for left, right in (
        ("with HACL", "with HACL, blind"),
        ("without HACL", "without HACL, blind"),
        ("with HACL", "without HACL"),
    ):
        for name, path in claims:
            values = [figure(results, left, path) - figure(results, right, path) for results in runs.values()]
            mean, half = interval(values)
            seeds = " | ".join(f"{value:+.1f}" for value in values)
            lines.append(f"| {name}: {left} - {right} | {seeds} | {mean:+.1f} ± {half:.1f} |")
    return "\n".join(lines) + "\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the pipeline for each seed and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--preset", default="nano")
    parser.add_argument("--output", type=Path, default=Path("docs/nano-seeds"))
    options = parser.parse_args(argv)
    from pipelines.local import run
    from shellv_core.logs import setup_logging

    setup_logging()
    runs, seconds = {}, {}
    for seed in options.seeds:
        done = run(options.preset, [f"seed={seed}", f"promote.registered_model=shellv-{options.preset}-seeds"])
        runs[seed], seconds[seed] = done.results, done.seconds
        text = f"Preset `{options.preset}`, seeds {', '.join(map(str, runs))}; all figures in percent.\n\n{table(runs)}"
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.with_suffix(".md").write_text(text, encoding="utf-8")
        content = {"preset": options.preset, "results": runs, "seconds": seconds}
        options.output.with_suffix(".json").write_text(json.dumps(content, indent=1), encoding="utf-8")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
