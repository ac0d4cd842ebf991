"""The evaluation report: one HTML file with everything in it."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from shellv_core.charts import Bar, Series, bar_chart
from shellv_core.evaluation.answers import told
from shellv_core.evaluation.benchmark import Benchmark, name_of
from shellv_core.evaluation.benchmarks.chair import Chair
from shellv_core.evaluation.benchmarks.hal_eval import TYPES
from shellv_core.evaluation.benchmarks.pope import SPLITS, Pope
from shellv_core.evaluation.suite import BLIND, CANDIDATE, ModelAnswers
from shellv_core.evaluation.table import mean_yes_ratio, score_rows, unparsed_share
from shellv_core.evaluation.yes_no import parse_strict

LABELS = {
    "candidate": "candidate",
    "candidate_blind": "candidate, blind",
    "without_hacl": "without HACL",
    "without_hacl_blind": "without HACL, blind",
}
COLORS = {
    "candidate": "#2f5bd0",
    "candidate_blind": "#b4c5f0",
    "without_hacl": "#d07a1f",
    "without_hacl_blind": "#f0d2ab",
}
NUM_FAILURES = 6
NUM_QUESTIONS = 4
PICTURE_SIDE = 240


@dataclass(frozen=True)
class Span:
    """A piece of a caption: plain, "right" (an object that is there) or "wrong" (one that is not)."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class QuestionRow:
    """A yes/no question, its truth and what each row answered, with whether that is right."""

    text: str
    truth: str
    answers: Sequence[tuple[str, bool]]


@dataclass(frozen=True)
class Picture:
    """One image of the report with what was said about it."""

    name: str
    data_uri: str
    objects: Sequence[str]
    captions: Sequence[tuple[str, Sequence[Span]]] = ()
    questions: Sequence[QuestionRow] = ()


@dataclass
class Lineage:
    """Where the evaluation comes from: name of the candidate, and title -> name -> value."""

    title: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)


def render_report(
    results: Mapping[str, Any],
    benchmarks: Sequence[Benchmark],
    models: Mapping[str, ModelAnswers],
    images: Mapping[str, bytes],
    lineage: Lineage,
    num_pictures: int = 8,
) -> str:
    """The report of `suite.judge`'s `results` as an HTML document."""
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup

    environment = Environment(
        loader=PackageLoader("shellv_core.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    environment.filters["points"] = lambda share: f"{100 * share:+.1f}"
    rows = score_rows(results)
    samples, failures = _choose(benchmarks, models, images, num_pictures)
    return environment.get_template("report.html.jinja").render(
        lineage=lineage,
        findings=summarize(results),
        rows=rows,
        labels=LABELS,
        colors=COLORS,
        cards=_cards(rows),
        charts=[(title, Markup(svg)) for title, svg in _charts(rows)],  # noqa: S704 - built by charts.py, labels escaped
        splits=[split for split in SPLITS if split in rows[CANDIDATE].get("pope", {})],
        types=[kind for kind in TYPES if kind in rows[CANDIDATE].get("hal_eval", {})],
        comparisons=results["comparisons"],
        metric_labels=_metric_labels(results),
        samples=samples,
        failures=failures,
        speakers=_speakers(models),
    )


def summarize(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Findings in words, as (kind, sentence) with kind good, bad or open; says whichever model is ahead."""
    findings = []
    comparisons = results["comparisons"]
    labels = _metric_labels(results)
    blind = comparisons.get(f"{CANDIDATE}_{BLIND}", {})
    for metric in ("pope_random_accuracy", "pope_adversarial_accuracy", "chair_instance_rate"):
        if metric in blind:
            findings.append(_against_blind(metric, labels[metric], blind[metric]))
    for row, against in comparisons.items():
        if row == f"{CANDIDATE}_{BLIND}":
            continue
        verdicts = {metric: _verdict(metric, each) for metric, each in against.items()}
        ahead = [labels[metric] for metric, verdict in verdicts.items() if verdict == "better"]
        behind = [labels[metric] for metric, verdict in verdicts.items() if verdict == "worse"]
        even = [labels[metric] for metric, verdict in verdicts.items() if verdict == "even"]
        sentence = f"Against the model {LABELS.get(row, row)}, the candidate is"
        parts = [f"better in {_listing(ahead)}"] if ahead else []
        parts += [f"worse in {_listing(behind)}"] if behind else []
        parts += [f"not measurably different in {_listing(even)}"] if even else []
        kind = "open" if bool(ahead) == bool(behind) else ("good" if ahead else "bad")
        findings.append((kind, f"{sentence} {'; '.join(parts)} (95 % paired intervals)."))
    for name, missing in results.get("missing", {}).items():
        effect = "the answers stay unscored" if name == "judge" else "they count as wrong"
        sentence = f"{missing['count']} answers of {LABELS.get(name, name)} are missing, and {effect}"
        findings.append(("bad", f"{sentence} ({told(missing['by_reason'])})."))
    rows = score_rows(results)
    unparsed = unparsed_share(rows[CANDIDATE])
    if unparsed > 0.01:
        findings.append(("bad", f"{100 * unparsed:.1f} % of the candidate's yes/no answers say neither yes nor no."))
    yes = mean_yes_ratio(rows[CANDIDATE])
    if "pope" in rows[CANDIDATE] and not 0.35 <= yes <= 0.65:
        findings.append(("bad", f"The candidate says yes to {100 * yes:.0f} % of POPE's questions; half are right."))
    return findings


def lower_is_better(metric: str) -> bool:
    """Whether a smaller value of a compared metric is the better one."""
    return metric.endswith("_rate")


def _verdict(metric: str, comparison: Mapping[str, Any]) -> str:
    low, high = comparison["low"], comparison["high"]
    if low <= 0 <= high:
        return "even"
    return "better" if (low > 0) != lower_is_better(metric) else "worse"


def _against_blind(metric: str, label: str, comparison: Mapping[str, Any]) -> tuple[str, str]:
    numbers = (
        f"{100 * comparison['difference']:+.1f} points against its own run with shuffled pictures"
        f" (95 % interval {100 * comparison['low']:+.1f} to {100 * comparison['high']:+.1f})"
    )
    verdict = _verdict(metric, comparison)
    if verdict == "better":
        return "good", f"The pictures help: {label} {numbers}."
    if verdict == "worse":
        return "bad", f"The pictures harm: {label} {numbers}."
    return "bad", f"No measurable use of the pictures: {label} {numbers}."


def _metric_labels(results: Mapping[str, Any]) -> dict[str, str]:
    labels = {f"pope_{split}_accuracy": f"POPE {split} accuracy" for split in SPLITS}
    labels |= {f"hal_eval_{kind}_accuracy": f"Hal-Eval {kind} accuracy" for kind in TYPES}
    labels["chair_instance_rate"] = "CHAIR instance rate"
    compared = {metric for comparison in results["comparisons"].values() for metric in comparison}
    return {metric: label for metric, label in labels.items() if metric in compared}


def _listing(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _cards(rows: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Headline figures of the candidate, each with the other rows' beneath."""
    figures = {
        "POPE accuracy": lambda scores: _mean(scores, "pope"),
        "Hal-Eval accuracy": lambda scores: _mean(scores, "hal_eval"),
        "CHAIR instance rate": lambda scores: scores["chair"]["instance_rate"] if "chair" in scores else None,
        "object recall": lambda scores: scores["chair"]["recall"] if "chair" in scores else None,
    }
    cards = []
    for title, figure in figures.items():
        values = {name: figure(scores) for name, scores in rows.items()}
        if values[CANDIDATE] is not None:
            hint = "lower is better" if lower_is_better(title.replace(" ", "_")) else "higher is better"
            cards.append({"title": title, "hint": hint, "values": values})
    return cards


def _mean(scores: Mapping[str, Any], key: str) -> float | None:
    blocks = list(scores.get(key, {}).values())
    return sum(block["accuracy"] for block in blocks) / len(blocks) if blocks else None


def _charts(rows: Mapping[str, Any]) -> list[tuple[str, str]]:
    charts = []
    for key, title, groups in (
        ("pope", "POPE accuracy, %", SPLITS),
        ("hal_eval", "Hal-Eval accuracy by type of hallucination, %", TYPES),
    ):
        shown = [group for group in groups if group in rows[CANDIDATE].get(key, {})]
        if shown:
            series = [
                Series(LABELS.get(name, name), COLORS.get(name, "#888"), [_bar(scores[key][group]) for group in shown])
                for name, scores in rows.items()
            ]
            charts.append((title, bar_chart(title, shown, series, chance=0.5)))
    if "chair" in rows[CANDIDATE]:
        title = "CHAIR, % (rates: lower is better)"
        series = [
            Series(
                LABELS.get(name, name),
                COLORS.get(name, "#888"),
                [
                    Bar(scores["chair"]["instance_rate"], *scores["chair"]["instance_rate_interval"]),
                    Bar(scores["chair"]["sentence_rate"]),
                    Bar(scores["chair"]["recall"]),
                ],
            )
            for name, scores in rows.items()
        ]
        charts.append((title, bar_chart(title, ["instance", "sentence", "recall"], series)))
    return charts


def _bar(block: Mapping[str, Any]) -> Bar:
    return Bar(block["accuracy"], *block["accuracy_interval"])


def _speakers(models: Mapping[str, ModelAnswers]) -> list[str]:
    """Rows whose answers are shown beside a picture."""
    return [*models, f"{CANDIDATE}_{BLIND}"]


def _said(models: Mapping[str, ModelAnswers], row: str, benchmark: Benchmark) -> Mapping[str, str]:
    if row.endswith(f"_{BLIND}"):
        return models[row.removesuffix(f"_{BLIND}")].blind[name_of(benchmark)]
    return models[row].sighted[name_of(benchmark)]


def _choose(
    benchmarks: Sequence[Benchmark], models: Mapping[str, ModelAnswers], images: Mapping[str, bytes], num_pictures: int
) -> tuple[list[Picture], list[Picture]]:
    """Evenly spaced samples, and the images where the candidate did worst."""
    chair = next((each for each in benchmarks if isinstance(each, Chair)), None)
    pope = [each for each in benchmarks if isinstance(each, Pope)]
    names = list(dict.fromkeys(question.image for question in (chair or benchmarks[0]).questions))
    # POPE's hardest split tells most.
    asked = pope[-1] if pope else None
    in_both = {question.image for question in asked.questions} if asked else set(names)
    shown = [name for name in names if name in in_both] or names
    step = max(1, len(shown) // max(1, num_pictures))
    samples = [_picture(name, chair, asked, models, images) for name in shown[::step][:num_pictures]]
    if chair is None:
        return samples, []
    captions = models[CANDIDATE].sighted[name_of(chair)]
    faults = {name: len(chair.judge(name, captions.get(name, "")).hallucinated) for name in names}
    worst = sorted((name for name in names if faults[name]), key=lambda name: -faults[name])[:NUM_FAILURES]
    return samples, [_picture(name, chair, None, models, images) for name in worst]


def _picture(
    name: str,
    chair: Chair | None,
    pope: Pope | None,
    models: Mapping[str, ModelAnswers],
    images: Mapping[str, bytes],
) -> Picture:
    captions = []
    if chair is not None:
        for row in _speakers(models):
            caption = _said(models, row, chair).get(name, "")
            captions.append((row, highlight(chair, name, caption)))
    questions = []
    asked = [(pope, each) for each in pope.questions if each.image == name] if pope is not None else []
    for pope, question in asked[:NUM_QUESTIONS]:
        truth = pope.truth[question.question_id]
        answers = [_said(models, row, pope).get(question.question_id, "") for row in _speakers(models)]
        questions.append(
            QuestionRow(
                question.prompt,
                "yes" if truth else "no",
                [(text or "(nothing)", parse_strict(text) is truth) for text in answers],
            )
        )
    objects = sorted(chair.present[name]) if chair else ()
    return Picture(name, _data_uri(images[name]), objects, captions, questions)


def highlight(chair: Chair, image: str, caption: str) -> list[Span]:
    """`caption` in pieces, mentions of objects marked right or wrong."""
    judgment = chair.judge(image, caption)
    spans, end = [], 0
    for mention in judgment.mentions:
        spans.append(Span(caption[end : mention.start]))
        kind = "right" if mention.category in judgment.present else "wrong"
        spans.append(Span(caption[mention.start : mention.end], kind))
        end = mention.end
    return [span for span in [*spans, Span(caption[end:])] if span.text]


def _data_uri(data: bytes) -> str:
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
