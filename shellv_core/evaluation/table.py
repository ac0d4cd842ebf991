"""The results as a plain-text (and Markdown) table, for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from shellv_core.evaluation.benchmarks.hal_eval import TYPES
from shellv_core.evaluation.benchmarks.pope import SPLITS

ROW_LABELS = {
    "candidate": "candidate",
    "candidate_blind": "  shuffled pictures",
    "without_hacl": "without HACL",
    "without_hacl_blind": "  shuffled pictures",
}
"""Row name -> its label in tables; blind rows stand below their model's."""


def score_rows(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Row name (``candidate``, ``candidate_blind``, ...) -> benchmark (``pope``, ``hal_eval``, ``chair``) -> scores."""
    rows: dict[str, dict[str, Any]] = {}
    for name, tree in results["models"].items():
        rows[name] = {key: value for key, value in tree.items() if not key.endswith("_blind")}
        rows[f"{name}_blind"] = {
            key.removesuffix("_blind"): value for key, value in tree.items() if key.endswith("_blind")
        }
    return rows


def render_table(results: Mapping[str, Any]) -> str:
    """Results of the evaluate stage as a Markdown table, a line per figure and a column per run.

    POPE and Hal-Eval lines are accuracies in percent with their 95 % half-width (chance 50, higher is better), CHAIR's
    instance and sentence rates the shares of hallucinated mentions and captions (lower is better), recall the share of
    present objects named.
    """
    columns = score_rows(results)
    cells = {name: _cells(scores) for name, scores in columns.items()}
    figures = list(cells["candidate"])
    header = ["%", *(ROW_LABELS.get(name, name).strip() for name in columns)]
    return (
        "\n".join(_markdown([header, *([figure, *(cells[name][figure] for name in columns)] for figure in figures)]))
        + "\n"
    )


def unparsed_share(scores: Mapping[str, Any]) -> float:
    """Share of yes/no questions of all benchmarks whose answer said neither."""
    blocks = [*scores.get("pope", {}).values(), *scores.get("hal_eval", {}).values()]
    asked = sum(block["num_questions"] for block in blocks)
    return sum(block["num_unparsed"] for block in blocks) / asked if asked else 0.0


def mean_yes_ratio(scores: Mapping[str, Any]) -> float:
    """Yes-ratio over the POPE splits."""
    blocks = list(scores.get("pope", {}).values())
    return sum(block["yes_ratio"] for block in blocks) / len(blocks) if blocks else 0.0


def _cells(scores: Mapping[str, Any]) -> dict[str, str]:
    cells: dict[str, str] = {}
    if "pope" in scores:
        cells |= {f"POPE {split}": _accuracy(scores["pope"][split]) for split in SPLITS if split in scores["pope"]}
        cells["POPE answered yes"] = _percent(mean_yes_ratio(scores))
    if "hal_eval" in scores:
        cells |= {
            f"Hal-Eval {kind}": _accuracy(scores["hal_eval"][kind]) for kind in TYPES if kind in scores["hal_eval"]
        }
    if "chair" in scores:
        names = {"CHAIR instances": "instance_rate", "CHAIR sentences": "sentence_rate", "CHAIR recall": "recall"}
        cells |= {name: _percent(scores["chair"][key]) for name, key in names.items()}
    cells["unparsed"] = _percent(unparsed_share(scores))
    return cells


def _accuracy(block: Mapping[str, Any]) -> str:
    low, high = block["accuracy_interval"]
    return f"{100 * block['accuracy']:.1f} ±{50 * (high - low):.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return [lines[0], rule, *lines[1:]]
