"""How runs, benchmarks and metrics are called where people read them."""

from __future__ import annotations

from collections.abc import Iterable

from shellv_core.evaluation.benchmarks import registry

CANDIDATE, BASELINE, BLIND = "candidate", "without_hacl", "blind"
_ROWS = {CANDIDATE: "candidate", BASELINE: "without HACL"}
_WORDS = {"chair": "CHAIR", "f1": "F1"}


def row_label(row: str) -> str:
    """A run's name in words, such as ``candidate, blind``."""
    model = row.removesuffix(f"_{BLIND}")
    return _ROWS.get(model, model) + (", blind" if model != row else "")


def family_of(name: str) -> str:
    """The benchmark of the registry that a metric, or a benchmark's place in the results, belongs to.

    The key of its scores, such as ``hal_eval``; a name of none is its own.
    """
    found = owner_of(name, (key.replace("-", "_") for key in registry()))
    return found or name


def owner_of(name: str, owners: Iterable[str]) -> str | None:
    """The longest of `owners` that `name` is or begins with."""
    return max((each for each in owners if f"{name}_".startswith(f"{each}_")), key=len, default=None)


def title_of(family: str) -> str:
    """A benchmark's name as its authors write it."""
    entry = registry().get(family.replace("_", "-"))
    return entry.summary.partition(":")[0] if entry else family


def metric_label(metric: str) -> str:
    """A flat metric in words, such as ``POPE random accuracy``."""
    family = family_of(metric)
    return f"{title_of(family)} {words(metric.removeprefix(family).strip('_'))}".strip()


def words(name: str) -> str:
    """A name of figures or groups in words."""
    return " ".join(_WORDS.get(part, part) for part in name.split("_"))


_NO_SHARES = frozenset({"chair", "cover", "hal", "cog", "amber_score", "perception", "cognition", "score"})


def figure_text(name: str, value: float, in_percent: bool = False) -> str:
    """A figure of a benchmark's scores as people read it: shares in percent, counts whole, the rest as it is.

    Args:
        in_percent: shares are in percent already.
    """
    if name.startswith("num_") or name in ("win", "tie", "loss"):
        return f"{value:,.0f}"
    if name.startswith("mean_"):
        return f"{value:.2f}"
    if name in _NO_SHARES or name == "relative_score" or in_percent:
        return f"{value:.1f}"
    return f"{100 * value:.1f}"
