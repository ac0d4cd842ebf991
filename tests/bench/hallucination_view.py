"""What the hallucination view is worth on a model: ROC, calibration and a blind baseline, as a page with a picture.

    python -m tests.bench.hallucination_view --model models:/shellv-nano@champion --data s3://shellv/prepare_data/...

Asks and measures as `shellv calibrate` does. Writes OUTPUT.md, OUTPUT.json and OUTPUT.svg from one run; what the page
says about how the view works is kept by hand above the mark.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from shellv_core.charts import Curve, line_chart
from shellv_core.logs import setup_logging
from shellv_core.stages.calibrate_command import run

MARK = "## Measured\n"
COLORS = ("#2563eb", "#ea580c", "#16a34a", "#9333ea")
STYLE = "<style>.grid{stroke:#ddd}.tick,.group{font:11px sans-serif;fill:#666}</style>"


def document(record: dict[str, Any], picture: str) -> str:
    """The measured part of the page."""
    figures, pictures = record["figures"], record["figures"]["pictures"]
    lines = [
        MARK,
        "Written by `python -m tests.bench.hallucination_view`. Model"
        f" `{record['model']}` (revision {record['revision'][:12]}); thresholds from {pictures['fitting']} validation"
        f" pictures, all figures from {pictures['measuring']} others. Area under the ROC curve: the chance that what is"
        " made up scores below what is not; 0.5 is chance. Intervals (95 %) resample pictures.",
        "",
        f"![ROC curves]({picture})",
        "",
    ]
    for kind, what in (("objects", "objects in answers"), ("sentences", "sentences of answers")):
        lines += _section(kind, what, figures[kind])
    if "captions" in figures:
        lines += _captions(figures["captions"])
    return "\n".join(lines) + "\n"


def _section(kind: str, what: str, found: dict[str, Any]) -> list[str]:
    lines = [f"### {kind.capitalize()}", "", f"{found['false']} of {found['count']} {what} are made up.", ""]
    lines += ["| score | area |", "|---|---:|"]
    lines += [f"| {name} | {_area(each)} |" for name, each in found["area"].items()]
    lines.append("")
    if "marked" not in found:
        return [*lines, "Too few of either kind, or no heads, to fit a threshold.", ""]
    shares = [f"{100 * found[each]:.0f} %" if found[each] is not None else "-" for each in ("precision", "recall")]
    lines.append(
        f"Marked at the threshold: {found['marked']}; {shares[0]} of them are made up, and {shares[1]} of all that is"
        " made up"
        f" is marked. Expected calibration error of `risk`: {found['calibration_error']:.3f}"
        + (
            f" (of one minus the confidence itself: {found['raw_calibration_error']:.3f})."
            if "raw_calibration_error" in found
            else "."
        )
    )
    lines += ["", "| risk told | share made up | count |", "|---:|---:|---:|"]
    lines += [f"| {each['risk']:.2f} | {each['share']:.2f} | {each['count']} |" for each in found["bins"]]
    return [*lines, ""]


def _captions(found: dict[str, Any]) -> list[str]:
    lines = [
        "### Hallucinated captions",
        "",
        "The data's own false captions against the true ones, which the model did not write: what HACL trains on.",
        "",
        "| type | area by margin | by blank picture alone | lower margin than its truth | by blank alone |",
        "|---|---:|---:|---:|---:|",
    ]
    for kind, each in found.items():
        lines.append(
            f"| {kind} | {_area(each['area'])} | {_area(each['blind_area'])} | {100 * each['lower_margin']:.0f} % |"
            f" {100 * each['blind_lower']:.0f} % |"
        )
    return [*lines, ""]


def _area(each: dict[str, float]) -> str:
    return f"{each['value']:.3f} [{each['low']:.3f}, {each['high']:.3f}]"


def chart(figures: dict[str, Any]) -> str:
    """Both ROC curves of each kind beside their blind baselines, as SVG."""
    curves = []
    for kind in ("objects", "sentences"):
        for name, points in figures[kind]["roc"].items():
            if name in ("confidence", "margin") or name.startswith("blind"):
                curves.append((f"{kind}: {name}", [(float(x), float(y)) for x, y in points]))
    colored = [Curve(label, COLORS[index % len(COLORS)], points) for index, (label, points) in enumerate(curves)]
    svg = line_chart("ROC", [*colored, Curve("chance", "#999999", [(0.0, 0.0), (1.0, 1.0)])])
    legend = "".join(
        f'<text x="300" y="{130 + 14 * index}" class="tick" style="fill:{each.color}">{each.label}</text>'
        for index, each in enumerate(colored)
    )
    head, _, rest = svg.partition(">")
    return f"{head}>{STYLE}{rest.removesuffix('</svg>')}{legend}</svg>\n"


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="as in shellv serve")
    parser.add_argument("--data", required=True, help="output of prepare_data that the model was not trained on")
    parser.add_argument("--heads", help="HACL heads (default: by the model's lineage)")
    parser.add_argument("--images", type=int, help="(default: the whole validation split)")
    parser.add_argument("--max-tokens", type=int, default=96)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, default=Path("docs/hallucination-view"))
    args = parser.parse_args()
    setup_logging()
    thresholds, figures = run(args.model, args.data, args.heads, "validation", args.images, args.max_tokens, args.seed)
    model = args.model.rstrip("/").rpartition("/")[2]
    record = {"model": model, "revision": thresholds.revision, "figures": figures}
    record["thresholds"] = thresholds.model_dump()
    target = args.output.with_suffix(".md")
    kept = target.read_text(encoding="utf-8").partition(MARK)[0] if target.is_file() else "# Hallucination view\n\n"
    target.write_text(kept + document(record, args.output.with_suffix(".svg").name), encoding="utf-8")
    args.output.with_suffix(".json").write_text(json.dumps(record) + "\n", encoding="utf-8")
    args.output.with_suffix(".svg").write_text(chart(figures), encoding="utf-8")
    print(target.read_text(encoding="utf-8").partition(MARK)[2])


if __name__ == "__main__":
    main()
