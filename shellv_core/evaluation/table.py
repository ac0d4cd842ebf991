"""The results as a plain-text (and Markdown) table, for a terminal and for a workflow engine's page."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from shellv_core.evaluation.naming import BLIND, CANDIDATE, metric_label, row_label


def score_rows(results: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """Row name (``candidate``, ``candidate_blind``, ...) -> benchmark (``pope``, ``hal_eval``, ``chair``) -> scores."""
    rows: dict[str, dict[str, Any]] = {}
    for name, tree in results["models"].items():
        rows[name] = {key: value for key, value in tree.items() if not key.endswith("_blind")}
        blind = {key.removesuffix("_blind"): value for key, value in tree.items() if key.endswith("_blind")}
        if blind:
            rows[f"{name}_blind"] = blind
    return rows


def render_table(results: Mapping[str, Any]) -> str:
    """Results of the evaluate stage as a Markdown table, a line per headline metric and a column per run.

    Percent with the 95 % half-width; of rates the lower is the better one.
    """
    columns = results["metrics"]
    trees = score_rows(results)
    header = ["%", *(f"{BLIND}" if row.endswith(f"_{BLIND}") else row_label(row) for row in columns)]
    lines = [
        [metric_label(metric), *(_figure(of_row[metric]) if metric in of_row else "" for of_row in columns.values())]
        for metric in columns[CANDIDATE]
    ]
    if "pope" in trees[CANDIDATE]:
        lines.append(["POPE answered yes", *(_percent(mean_yes_ratio(trees[row])) for row in columns)])
    lines.append(["unparsed", *(_percent(unparsed_share(trees[row])) for row in columns)])
    return "\n".join(markdown([header, *lines])) + "\n"


def render_comparison_table(
    figures: tuple[Mapping[str, Any], Mapping[str, Any]], comparison: Mapping[str, Mapping[str, Any]]
) -> str:
    """Two models' figures and `evidence.compare` of them as a Markdown table, in percent."""
    verdicts = {"better": "A is better", "worse": "B is better", "even": "no measurable difference"}
    lines = [
        [
            metric_label(metric),
            *(_percent(of_model[metric]["value"]) for of_model in figures),
            f"{100 * each['difference']:+.1f}",
            f"{100 * each['low']:+.1f} to {100 * each['high']:+.1f}",
            f"{each['p_value']:.2g}",
            f"{each['p_holm']:.2g}",
            verdicts[each["verdict"]],
        ]
        for metric, each in comparison.items()
    ]
    return "\n".join(markdown([["%", "A", "B", "A - B", "95 % interval", "p", "p, Holm", "verdict"], *lines])) + "\n"


def unparsed_share(scores: Mapping[str, Any]) -> float:
    """Share of all benchmarks' questions whose answer could not be read."""
    blocks = list(_counted(scores))
    asked = sum(block["num_questions"] for block in blocks)
    return sum(block["num_unparsed"] for block in blocks) / asked if asked else 0.0


def mean_yes_ratio(scores: Mapping[str, Any]) -> float:
    """Yes-ratio over the POPE splits."""
    blocks = list(scores.get("pope", {}).values())
    return sum(block["yes_ratio"] for block in blocks) / len(blocks) if blocks else 0.0


def _counted(scores: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if "num_unparsed" in scores and "num_questions" in scores:
        yield scores
        return
    for key, value in scores.items():
        if isinstance(value, Mapping) and key != "author_rule":
            yield from _counted(value)


def _figure(figure: Mapping[str, float]) -> str:
    return f"{100 * figure['value']:.1f} ±{50 * (figure['high'] - figure['low']):.1f}"


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def markdown(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines of a Markdown table that reads well as text too; the first row is its header."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |" for row in rows]
    rule = "|" + "|".join(["-" * (widths[0] + 2), *("-" * (width + 1) + ":" for width in widths[1:])]) + "|"
    return [lines[0], rule, *lines[1:]]
