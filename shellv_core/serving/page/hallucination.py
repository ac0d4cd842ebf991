"""What the server knows of an answer's truth, as spans of its text."""

from __future__ import annotations

from typing import Any

Spans = list[tuple[str, str | None]]

DOUBTFUL = "⚠"
COLORS = {DOUBTFUL: "#f59e0b", "≥ 90 %": "#10b981", "50-90 %": "#84cc16", "< 50 %": "#ef4444"}
"""Of the labels that `highlighted` gives."""


def highlighted(text: str, view: dict[str, Any] | None) -> Spans:
    """`text` in spans for a HighlightedText component: objects by the model's confidence, marked sentences as such.

    Args:
        text: the answer.
        view: the response's ``shellv.hallucination``: ``objects``, each with ``start``, ``end`` (characters),
            ``confidence`` (0 to 1) and ``marked``, and ``sentences``, each with ``start``, ``end`` and ``marked``; None
            where there is none.
    """
    view = view or {}
    labels: list[str | None] = [None] * len(text)
    for sentence in view.get("sentences", ()):
        if sentence.get("marked"):
            labels[sentence["start"] : sentence["end"]] = [DOUBTFUL] * len(text[sentence["start"] : sentence["end"]])
    for each in view.get("objects", ()):
        if each.get("confidence") is not None:
            label = _label(each["confidence"])
            labels[each["start"] : each["end"]] = [label] * len(text[each["start"] : each["end"]])
    spans: Spans = []
    for character, kind in zip(text, labels, strict=True):
        if spans and spans[-1][1] == kind:
            spans[-1] = (spans[-1][0] + character, kind)
        else:
            spans.append((character, kind))
    return spans


def _label(confidence: float) -> str:
    return "≥ 90 %" if confidence >= 0.9 else "50-90 %" if confidence >= 0.5 else "< 50 %"
