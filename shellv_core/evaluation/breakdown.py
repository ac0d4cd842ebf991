"""A benchmark's scores by type, and beside published ones, as tables of text."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from typing import Any

from shellv_core.evaluation.naming import figure_text, words

PUBLISHED_NAME = "published.json"
_AUTHORS = "author_rule"
# Nested figures that are no groups.
_DETAILS = frozenset({_AUTHORS, "parsed_only", "counts"})
_HIDDEN = frozenset({"num_unknown", "num_correct", "num_image_questions"})
# What is shown of the authors' rule, to be held against published figures.
_AUTHORS_FIGURES = (
    "accuracy",
    "f1",
    "image_accuracy",
    "chair",
    "cover",
    "hal",
    "cog",
    "instance_rate",
    "sentence_rate",
    "mean_score",
    "hallucination_rate",
    "relative_score",
    "perception",
    "cognition",
)


_Path = tuple[str, ...]


@dataclass(frozen=True)
class Table:
    """Figures of several groups, for each run a line: (group, run, cells); a cell is a figure and its interval."""

    title: str
    columns: Sequence[str]
    lines: Sequence[tuple[str, str, Sequence[tuple[str, str]]]]


@dataclass(frozen=True)
class Published:
    """Figures from elsewhere: (model, figures, source), with the candidate's own first.

    Attributes:
        note: why they compare with the candidate's, or do not.
        comparable: whether as many questions were asked here.
    """

    protocol: str
    columns: Sequence[str]
    own: Sequence[str]
    lines: Sequence[tuple[str, Sequence[str], str]]
    note: str
    comparable: bool


def tables(family: str, rows: Mapping[str, Mapping[str, Any]]) -> list[Table]:
    """Tables of a benchmark's scores.

    Args:
        family: the benchmark.
        rows: run -> its scores, all of one form.
    """
    blocks: dict[str, dict[str, Mapping[str, Any]]] = {}
    lists: dict[str, dict[str, Mapping[str, float]]] = {}
    for row, scores in rows.items():
        if any(_is_number(value) for key, value in scores.items() if key not in _HIDDEN):
            blocks.setdefault("all", {})[row] = scores
        for path, block in _blocks(scores):
            if all(_is_number(value) for value in block.values()) and _names_groups(path[-1]):
                lists.setdefault(words("_".join(path)), {})[row] = block
            else:
                blocks.setdefault(_group(path), {})[row] = block
    result = []
    forms: dict[tuple[str, ...], list[str]] = {}
    for group, of_rows in blocks.items():
        forms.setdefault(tuple(_columns(next(iter(of_rows.values())))), []).append(group)
    for columns, groups in forms.items():
        lines = [
            (group, row, [_cell(block, column, family) for column in columns])
            for group in groups
            for row, block in blocks[group].items()
        ]
        if columns:
            result.append(Table("", [_heading(column) for column in columns], lines))
    for title, of_names in lists.items():
        names = list(dict.fromkeys(name for block in of_names.values() for name in block))
        leaf = "mean_" if title.startswith("mean") else "num_" if title.startswith("num") else ""
        lines = [
            (words(name), row, [(figure_text(leaf, block[name]) if name in block else "", "")])
            for name in names
            for row, block in of_names.items()
        ]
        result.append(Table(title, [title], lines))
    return result


def group_shares(scores: Mapping[str, Any]) -> dict[str, float]:
    """Shares by group where the scores have a plain list of them, for a chart."""
    for path, block in _blocks(scores):
        if block and all(_is_number(value) for value in block.values()) and _names_groups(path[-1]):
            if path[-1].startswith(("mean_", "num_")):
                continue
            return {words(name): float(value) for name, value in block.items()}
    return {_group(path): float(block["accuracy"]) for path, block in _blocks(scores) if "accuracy" in block}


def published(family: str, scores: Mapping[str, Any], num_questions: Sequence[int]) -> list[Published]:
    """Published figures of a benchmark beside the candidate's.

    Args:
        family: the benchmark.
        scores: the candidate's.
        num_questions: how many each of the benchmark's parts asked here.
    """
    content: list[dict[str, Any]] = json.loads(files(__package__).joinpath(PUBLISHED_NAME).read_text("utf-8"))
    result = []
    for table in content:
        if table["benchmark"] != family:
            continue
        paths = list(table["figures"].values())
        asked = table["questions"]
        same = bool(asked) and all(count in asked for count in num_questions)
        here = f"{' + '.join(f'{count:,}' for count in num_questions)} questions were asked here"
        if same:
            note = f"{here}, as many as there: they compare if these are the authors' own files and pictures."
        elif asked:
            there = " + ".join([f"{max(asked):,}"] * len(num_questions))
            note = f"Not comparable: {here}, {there} there."
        else:
            note = f"Comparable only with the same questions and scorer: {here}."
        result.append(
            Published(
                protocol=table["protocol"],
                columns=list(table["figures"]),
                own=[_own(scores, path.split("."), family) for path in paths],
                lines=list(
                    zip(
                        [row["model"] for row in table["rows"]],
                        zip(*map(_aligned, zip(*(row["values"] for row in table["rows"]), strict=True)), strict=True),
                        [row["source"] for row in table["rows"]],
                        strict=True,
                    )
                ),
                note=note,
                comparable=same,
            )
        )
    return result


def _aligned(values: Sequence[float | None]) -> list[str]:
    """A column of figures with as many decimals as the longest has."""
    decimals = max(len(f"{value:g}".partition(".")[2]) for value in values if value is not None)
    return ["" if value is None else f"{value:.{decimals}f}" for value in values]


def _own(scores: Mapping[str, Any], path: Sequence[str], family: str) -> str:
    found = list(_find(scores, path))
    if not found:
        return ""
    return figure_text(path[-1], sum(found) / len(found), _in_percent(family, path))


def _find(scores: Any, path: Sequence[str]) -> Iterator[float]:
    if not path:
        if _is_number(scores):
            yield float(scores)
    elif isinstance(scores, Mapping):
        for value in scores.values() if path[0] == "*" else [scores[path[0]]] if path[0] in scores else []:
            yield from _find(value, path[1:])


def _blocks(scores: Mapping[str, Any], path: _Path = ()) -> Iterator[tuple[_Path, Mapping[str, Any]]]:
    """Nested figures with their place; of groups within groups the inner ones."""
    for key, value in scores.items():
        if not isinstance(value, Mapping) or key in _DETAILS or not value:
            continue
        inner = [each for name, each in value.items() if isinstance(each, Mapping) and name not in _DETAILS]
        if len(inner) == len(value):
            yield from _blocks(value, (*path, key))
        else:
            yield (*path, key), value


def _group(path: Sequence[str]) -> str:
    return " ".join(words(part) for part in path if not part.startswith("by_"))


def _names_groups(key: str) -> bool:
    """Whether the keys below `key` are groups, and not figures."""
    return "by_" in key or key.endswith("_shares")


def _columns(block: Mapping[str, Any]) -> list[str]:
    own = [key for key, value in block.items() if _is_number(value) and key not in _HIDDEN]
    main = [key for key in own if not key.startswith("num_")]
    counts = [key for key in own if key.startswith("num_")]
    authors = block.get(_AUTHORS) or {}
    parsed = ["parsed_only.accuracy"] if "parsed_only" in block else []
    return [*main, *parsed, *(f"{_AUTHORS}.{key}" for key in _AUTHORS_FIGURES if key in authors), *counts]


def _heading(column: str) -> str:
    if column == "parsed_only.accuracy":
        return "accuracy of parsed"
    if column.startswith(_AUTHORS):
        return f"authors' {words(column.removeprefix(f'{_AUTHORS}.'))}"
    return words(column.removeprefix("num_"))


def _cell(block: Mapping[str, Any], column: str, family: str) -> tuple[str, str]:
    path = column.split(".")
    value = next(_find(block, path), None)
    if value is None:
        return "", ""
    text = figure_text(path[-1], value, _in_percent(family, path))
    interval = block.get(f"{column}_interval")
    return text, f"{100 * interval[0]:.1f}–{100 * interval[1]:.1f}" if interval else ""


def _in_percent(family: str, path: Sequence[str]) -> bool:
    # AMBER's authors print percent.
    return family == "amber" and _AUTHORS in path


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
