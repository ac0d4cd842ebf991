"""The training report: one HTML file with a run's curves, rates, settings and what was frozen."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from shellv_core.charts import Curve, line_chart

COLORS = ("#2f5bd0", "#d07a1f", "#1c7c4a", "#8a3fb0", "#b3261e", "#5d6979")
#: Charts and what each shows; what a run did not log is left out.
CHARTS: dict[str, tuple[str, ...]] = {
    "Loss": ("loss", "generation_loss"),
    "Contrast": ("image_to_text_loss", "text_to_image_loss", "truth_loss", "text_margin_loss"),
    "Hallucination margin by type": (
        "hallucination_margin_object",
        "hallucination_margin_attribute",
        "hallucination_margin_relation",
        "hallucination_margin_event",
        "hallucination_margin_unspecified",
    ),
    "Told from hallucinated captions, retrieved": ("hallucination_accuracy", "retrieval_accuracy"),
    "Preference": ("preference_loss", "preference_image_loss", "preference_anchor_loss", "reward_margin"),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("gradient_norm",),
    "Tokens a second": ("tokens_per_second",),
    "Shares": ("useful_token_share", "mfu", "data_wait_share", "queue_fill"),
    "Peak memory, GB": ("peak_memory_gb",),
    "Temperature": ("temperature",),
}
FIGURES = ("loss", "tokens_per_second", "samples_per_second", "mfu", "useful_token_share", "peak_memory_gb")


@dataclass(frozen=True)
class Chart:
    """A chart, and which color is which."""

    title: str
    svg: Any
    legend: Sequence[tuple[str, str]]


def render_training_report(
    title: str,
    history: Sequence[tuple[int, Mapping[str, float]]],
    parts: str,
    sections: Mapping[str, Mapping[str, Any]],
) -> str:
    """The report as an HTML document that needs nothing else.

    Args:
        history: steps and their metrics, of all processes that the run took.
        parts: a table of the model's parts and what learns, as text.
        sections: further tables: title -> name -> value.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("shellv_core.training"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    last: Mapping[str, float] = history[-1][1] if history else {}
    return environment.get_template("report.html.jinja").render(
        title=title,
        num_steps=history[-1][0] if history else 0,
        figures=[(name.replace("_", " "), f"{last[name]:.4g}") for name in FIGURES if name in last],
        charts=_charts(history),
        parts=parts,
        sections=sections,
    )


def _charts(history: Sequence[tuple[int, Mapping[str, float]]]) -> list[Chart]:
    from markupsafe import Markup

    charts = []
    for title, names in CHARTS.items():
        curves = []
        for name, color in zip(names, COLORS, strict=False):
            points = [(float(step), metrics[name]) for step, metrics in history if name in metrics]
            if points:
                curves.append(Curve(name.removeprefix("hallucination_margin_").replace("_", " "), color, points))
        if curves:
            svg = Markup(line_chart(title, curves))  # noqa: S704 - built by charts.py, labels escaped
            charts.append(Chart(title, svg, [(each.label, each.color) for each in curves]))
    return charts
