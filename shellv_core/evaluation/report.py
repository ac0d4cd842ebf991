"""The evaluation report, and two models side by side: each one HTML file with everything in it."""

from __future__ import annotations

import base64
import difflib
import io
import re
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, zip_longest
from typing import Any

from shellv_core.charts import Bar, Series, bar_chart
from shellv_core.evaluation.answers import told
from shellv_core.evaluation.benchmark import Benchmark, name_of
from shellv_core.evaluation.benchmarks.chair import Chair
from shellv_core.evaluation.breakdown import group_shares, published, tables
from shellv_core.evaluation.evidence import Evidence, confusion, rightness
from shellv_core.evaluation.naming import BLIND, CANDIDATE, family_of, metric_label, row_label, title_of
from shellv_core.evaluation.table import mean_yes_ratio, render_table, score_rows, unparsed_share
from shellv_core.tracking.gate import lower_is_better

# Of each benchmark, and of all together: what a report shows, so that its size has a bound.
NUM_FAILURES, MAX_FAILURES = 2, 30
NUM_DIFFERENCES, MAX_DIFFERENCES = 2, 30
NUM_QUESTIONS = 4
MAX_TEXT = 600
PICTURE_SIDE = 240
MAX_CHART_GROUPS = 24
MAX_LISTED = 8

_VERDICTS = {"better": "better in", "worse": "worse in", "even": "not measurably different in"}

Keys = Sequence[tuple[str, str]]
"""Questions: benchmark name and question id."""

Marks = Mapping[str, Callable[[str, str], "list[Span]"]]
"""Benchmark name -> what to mark in an answer, of question id and text."""


@dataclass(frozen=True)
class Span:
    """A piece of an answer: plain, "right" (an object that is there), "wrong" (one that is not), or "other" (not in the
    other model's answer)."""

    text: str
    kind: str = ""


@dataclass(frozen=True)
class Said:
    """What one run answered, and how right that is from 0 to 1, None where nobody knows."""

    row: str
    spans: Sequence[Span]
    right: float | None


@dataclass(frozen=True)
class Reply:
    """A question, what is right, and what each run said."""

    benchmark: str
    text: str
    expected: str
    said: Sequence[Said]


@dataclass(frozen=True)
class Card:
    """One image with what was said about it."""

    image: str
    data_uri: str
    replies: Sequence[Reply]


@dataclass
class Lineage:
    """Where the evaluation comes from: name of the candidate, and title -> name -> value."""

    title: str
    sections: dict[str, dict[str, Any]] = field(default_factory=dict)


def render_report(
    results: Mapping[str, Any],
    rows: Mapping[str, Evidence],
    images: Mapping[str, bytes],
    lineage: Lineage,
    num_pictures: int = 8,
    marks: Marks | None = None,
) -> str:
    """The report of `suite.judge`'s `results` as an HTML document.

    Args:
        results: scores, metrics and comparisons.
        rows: the evidence that they rest on.
        images: image name -> encoded file.
        lineage: where all comes from.
        num_pictures: how many pictures are shown whatever was said about them.
        marks: what to mark in answers.
    """
    trees = score_rows(results)
    families = list(dict.fromkeys(map(family_of, results["metrics"][CANDIDATE])))
    others = [row for row in (*results["models"], f"{CANDIDATE}_{BLIND}") if row in rows and row != CANDIDATE]
    speakers = [CANDIDATE, *others]
    cards = _Cards(rows, images, marks or {})
    num_questions = {
        family: [len(asked) for name, asked in rows[CANDIDATE].questions.items() if family_of(name) == family]
        for family in families
    }
    return _render(
        "report.html.jinja",
        dict.fromkeys(rows),
        {row: row_label(row) for row in rows},
        lineage=lineage,
        findings=summarize(results),
        results=results,
        families=families,
        cards=_headlines(results["metrics"], families),
        charts=_charts(results["metrics"], families, results["confusion"][CANDIDATE], trees),
        published={family: published(family, trees[CANDIDATE][family], num_questions[family]) for family in families},
        breakdown={
            family: tables(family, {row: scores[family] for row, scores in trees.items()}) for family in families
        },
        confusion=results["confusion"],
        other=others[0] if others else "",
        differences=cards.differences(CANDIDATE, others[0]) if others else [],
        failures=cards.failures(CANDIDATE, speakers),
        samples=cards.samples(speakers, num_pictures),
    )


def render_comparison(
    labels: tuple[str, str],
    rows: tuple[Evidence, Evidence],
    figures: tuple[Mapping[str, Any], Mapping[str, Any]],
    comparison: Mapping[str, Mapping[str, Any]],
    images: Mapping[str, bytes],
) -> str:
    """Two models on the same questions, as an HTML document.

    Args:
        labels: what they are called.
        rows: what they said.
        figures: metric -> value, low and high of each.
        comparison: `evidence.compare` of the two.
        images: image name -> encoded file; pictures that are not there are left out.
    """
    metrics = {
        name: {metric: each for metric, each in of_row.items() if metric in comparison}
        for name, of_row in zip(("first", "second"), figures, strict=True)
    }
    families = list(dict.fromkeys(map(family_of, comparison)))
    cards = _Cards(dict(zip(metrics, rows, strict=True)), images, {})
    short = dict(zip(metrics, "AB", strict=True))
    return _render(
        "comparison.html.jinja",
        {"first": None, "between": None, "second": None},
        short,
        names=dict(zip(metrics, labels, strict=True)),
        metrics=metrics,
        comparison=comparison,
        families=families,
        charts=_charts(metrics, families, confusion(rows[0]), {}, short),
        differences=cards.differences("first", "second", 2 * NUM_DIFFERENCES),
    )


def render_summary(results: Mapping[str, Any]) -> str:
    """The findings and the table of headline metrics, as Markdown."""
    findings = "".join(f"- {sentence}\n" for _, sentence in summarize(results))
    return f"{findings}\n{render_table(results)}"


def summarize(results: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Findings in words, as (kind, sentence) with kind good, bad or open; says whichever model is ahead."""
    findings = []
    for row, against in results["comparisons"].items():
        by_verdict: dict[str, list[str]] = {"better": [], "worse": [], "even": []}
        for metric, each in against.items():
            by_verdict[each["verdict"]].append(metric_label(metric))
        parts = [f"{words} {_listing(by_verdict[key])}" for key, words in _VERDICTS.items() if by_verdict[key]]
        ahead, behind = bool(by_verdict["better"]), bool(by_verdict["worse"])
        kind = "open" if ahead == behind else "good" if ahead else "bad"
        start = f"Against the model {row_label(row)}"
        if row == f"{CANDIDATE}_{BLIND}":
            kind = "good" if ahead and not behind else "open" if ahead else "bad"
            use = "The pictures help" if ahead else "The pictures harm" if behind else "No measurable use of pictures"
            start = f"{use}: with the right ones instead of shuffled ones"
        findings.append((kind, f"{start}, the candidate is {'; '.join(parts)}."))
    for name, missing in results.get("missing", {}).items():
        effect = "the answers stay unscored" if name == "judge" else "they count as wrong"
        sentence = f"{missing['count']} answers of {row_label(name)} are missing, and {effect}"
        findings.append(("bad", f"{sentence} ({told(missing['by_reason'])})."))
    candidate = score_rows(results)[CANDIDATE]
    unparsed = unparsed_share(candidate)
    if unparsed > 0.01:
        findings.append(("bad", f"{100 * unparsed:.1f} % of the candidate's answers say nothing that can be scored."))
    yes = mean_yes_ratio(candidate)
    if "pope" in candidate and not 0.35 <= yes <= 0.65:
        findings.append(("bad", f"The candidate says yes to {100 * yes:.0f} % of POPE's questions; half are right."))
    return findings


def marks_of(benchmarks: Iterable[Benchmark]) -> Marks:
    """What to mark in answers to these benchmarks: the objects that captions name."""

    def marker(chair: Chair) -> Callable[[str, str], list[Span]]:
        return lambda image, caption: highlight(chair, image, caption)

    return {name_of(each): marker(each) for each in benchmarks if isinstance(each, Chair)}


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


def contrast(text: str, other: str) -> list[Span]:
    """`text` in pieces, what `other` does not say marked."""
    ours, theirs = (re.findall(r"\s*\S+", each) for each in (text, other))
    matcher = difflib.SequenceMatcher(
        None, [word.strip().lower() for word in ours], [word.strip().lower() for word in theirs], autojunk=False
    )
    spans = []
    for change, start, end, _, _ in matcher.get_opcodes():
        piece = "".join(ours[start:end])
        gap = piece[: len(piece) - len(piece.lstrip())]
        spans += [Span(gap), Span(piece[len(gap) :], "" if change == "equal" else "other")]
    return [span for span in spans if span.text]


class _Cards:
    """Chooses images and makes their cards."""

    def __init__(self, rows: Mapping[str, Evidence], images: Mapping[str, bytes], marks: Marks) -> None:
        self._rows, self._images, self._marks = rows, images, marks
        self._questions = next(iter(rows.values())).questions
        self._right = {
            row: {name: rightness(evidence, name) for name in self._questions} for row, evidence in rows.items()
        }
        self._uris: dict[str, str] = {}

    def samples(self, speakers: Sequence[str], count: int) -> list[Card]:
        """Evenly spaced images with the questions about them."""
        asked: dict[str, list[tuple[str, str]]] = {}
        for name, questions in self._questions.items():
            for key, each in questions.items():
                asked.setdefault(each.question.image, []).append((name, key))
        asked.pop("", None)
        # Those that most benchmarks ask about say most.
        most = max((len({name for name, _ in keys}) for keys in asked.values()), default=0)
        shown = [image for image, keys in asked.items() if len({name for name, _ in keys}) == most]
        step = max(1, len(shown) // max(1, count))
        return [self._card(_spread(asked[image], NUM_QUESTIONS), speakers) for image in shown[::step][:count]]

    def failures(self, row: str, speakers: Sequence[str]) -> list[Card]:
        """The images of each benchmark about which `row` was wrong most, with the questions that it failed."""
        chosen = []
        for name, questions in self._questions.items():
            faults: dict[str, list[tuple[float, str]]] = {}
            for key, right in self._right[row][name].items():
                if right < 1:
                    faults.setdefault(questions[key].question.image or key, []).append((1 - right, key))
            worst = sorted(faults.values(), key=lambda keys: -sum(fault for fault, _ in keys))
            chosen.append([[(name, key) for _, key in sorted(keys, key=lambda each: -each[0])] for keys in worst])
        return [self._card(keys[:NUM_QUESTIONS], speakers) for keys in self._once(chosen, NUM_FAILURES, MAX_FAILURES)]

    def differences(self, first: str, second: str, of_each: int = NUM_DIFFERENCES) -> list[Card]:
        """Questions of each benchmark on which the two differ most, the first behind and ahead in turn."""
        chosen = []
        for name in self._questions:
            right = {row: self._right[row][name] for row in (first, second)}
            gaps = {key: right[first][key] - right[second][key] for key in right[first] if key in right[second]}
            ahead = sorted((key for key in gaps if gaps[key] > 0), key=lambda key: -gaps[key])
            behind = sorted((key for key in gaps if gaps[key] < 0), key=lambda key: gaps[key])
            chosen.append([[(name, key)] for key in _in_turn([behind, ahead])])
        return [
            self._card(keys, (first, second), contrasted=True) for keys in self._once(chosen, of_each, MAX_DIFFERENCES)
        ]

    def _once(self, chosen: Sequence[Sequence[Keys]], of_each: int, count: int) -> list[Keys]:
        """The first of each benchmark in turn, but none that asks what another has asked about the same image."""
        seen: set[tuple[str, str]] = set()
        kept: list[list[Keys]] = [[] for _ in chosen]
        for place, candidates in enumerate(chosen):
            for keys in candidates:
                questions = [self._questions[name][key].question for name, key in keys]
                asked = {(each.image, each.prompt) for each in questions}
                if len(kept[place]) < of_each and seen.isdisjoint(asked):
                    seen |= asked
                    kept[place].append(keys)
        return _in_turn(kept)[:count]

    def _card(self, keys: Keys, speakers: Sequence[str], contrasted: bool = False) -> Card:
        """A card of questions about one image."""
        image = next(self._questions[name][key].question.image for name, key in keys)
        replies = []
        for name, key in keys:
            asked = self._questions[name][key]
            texts = {row: _clip(self._rows[row].answers[name].get(key, "")) for row in speakers}
            said = []
            for row, text in texts.items():
                if name in self._marks:
                    spans = self._marks[name](key, text)
                elif contrasted:
                    spans = contrast(text, next(each for other, each in texts.items() if other != row))
                else:
                    spans = [Span(text)] if text else []
                said.append(Said(row, spans, self._right[row][name].get(key)))
            title = metric_label(name)
            replies.append(Reply(title, _clip(asked.question.prompt), _clip(asked.expected), said))
        return Card(image, self._data_uri(image), replies)

    def _data_uri(self, name: str) -> str:
        if name not in self._uris:
            self._uris[name] = _data_uri(self._images[name]) if name in self._images else ""
        return self._uris[name]


def _render(template: str, rows: Mapping[str, Any], labels: Mapping[str, str], **values: Any) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("shellv_core.evaluation"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["percent"] = lambda share: f"{100 * share:.1f}"
    environment.filters["points"] = lambda share: f"{100 * share:+.1f}"
    environment.filters["p"] = lambda value: "p < 0.001" if value < 0.001 else f"p = {value:.3f}"
    environment.filters["metric"] = metric_label
    environment.filters["family"] = family_of
    environment.filters["title_of"] = title_of
    environment.globals["lower_is_better"] = lower_is_better
    colors = {row: _color(place) for place, row in enumerate(rows)}
    return environment.get_template(template).render(labels=labels, colors=colors, **values)


def _color(place: int) -> str:
    return f"var(--row-{place % 4})"


def _headlines(metrics: Mapping[str, Any], families: Sequence[str]) -> list[dict[str, Any]]:
    """For each benchmark its metrics' mean, or its first metric where they measure different things."""
    cards = []
    for family in families:
        names = [name for name in metrics[CANDIDATE] if family_of(name) == family]
        same = len({name.rpartition("_")[2] for name in names}) == 1
        shown = names if same else names[:1]
        values = {row: sum(of_row[name]["value"] for name in shown) / len(shown) for row, of_row in metrics.items()}
        title = f"{title_of(family)} {names[0].rpartition('_')[2]}" if len(shown) > 1 else metric_label(names[0])
        hint = "lower is better" if lower_is_better(names[0]) else "higher is better"
        cards.append({"title": title, "hint": hint, "figures": values})
    return cards


def _charts(
    metrics: Mapping[str, Any],
    families: Sequence[str],
    yes_no: Container[str],
    trees: Mapping[str, Mapping[str, Any]],
    labels: Mapping[str, str] | None = None,
) -> list[tuple[str, Any]]:
    from markupsafe import Markup

    places = {row: place for place, row in enumerate(metrics)} if trees else {"first": 0, "second": 2}
    named = labels or {row: row_label(row) for row in metrics}
    drawn = []
    for family in families:
        names = [name for name in next(iter(metrics.values())) if family_of(name) == family]
        marked = [
            metric_label(name).removeprefix(title_of(family)).strip() + " (lower is better)" * lower_is_better(name)
            for name in names
        ]
        figures = {
            row: [Bar(of_row[name]["value"], of_row[name]["low"], of_row[name]["high"]) for name in names]
            for row, of_row in metrics.items()
        }
        # Half of the questions are a yes.
        chance = 0.5 if family in yes_no and all(name.endswith("_accuracy") for name in names) else None
        drawn.append((title_of(family), marked, figures, chance))
        groups = {row: group_shares(scores[family]) for row, scores in trees.items()}
        shown = list(groups.get(CANDIDATE, {}))[:MAX_CHART_GROUPS]
        if len(shown) > 1 and len(shown) != len(names):
            bars = {row: [Bar(shares.get(group, 0.0)) for group in shown] for row, shares in groups.items()}
            drawn.append((f"{title_of(family)} by type", shown, bars, None))
    return [
        (
            title,
            # Built by charts.py, labels escaped.
            Markup(  # noqa: S704
                bar_chart(
                    f"{title}, %",
                    groups,
                    [Series(named[row], _color(places[row]), bars) for row, bars in figures.items()],
                    chance,
                )
            ),
        )
        for title, groups, figures, chance in drawn
    ]


def _listing(names: Sequence[str]) -> str:
    if len(names) > MAX_LISTED:
        return f"{len(names)} metrics"
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _in_turn(lists: Iterable[Sequence[Any]]) -> list[Any]:
    """The first of each list, then the second of each, and so on."""
    return [each for each in chain.from_iterable(zip_longest(*lists)) if each is not None]


def _spread(keys: Keys, count: int) -> Keys:
    """Up to `count` questions, of as many benchmarks as there are."""
    by_benchmark: dict[str, list[tuple[str, str]]] = {}
    for key in keys:
        by_benchmark.setdefault(key[0], []).append(key)
    return sorted(_in_turn(by_benchmark.values())[:count], key=keys.index)


def _clip(text: str) -> str:
    return text if len(text) <= MAX_TEXT else text[: MAX_TEXT - 1] + "…"


def _data_uri(data: bytes) -> str:
    from PIL import Image

    image = Image.open(io.BytesIO(data)).convert("RGB")
    image.thumbnail((PICTURE_SIDE, PICTURE_SIDE))
    buffer = io.BytesIO()
    image.save(buffer, format="JPEG", quality=85)
    return "data:image/jpeg;base64," + base64.b64encode(buffer.getvalue()).decode()
