import json
import random
from html.parser import HTMLParser
from io import BytesIO
from pathlib import Path

import pytest

from shellv_core.charts import Bar, Series, bar_chart
from shellv_core.evaluation.benchmark import name_of
from shellv_core.evaluation.benchmarks import registry
from shellv_core.evaluation.benchmarks.chair import Chair
from shellv_core.evaluation.breakdown import published, tables
from shellv_core.evaluation.report import (
    MAX_DIFFERENCES,
    MAX_FAILURES,
    Lineage,
    Span,
    contrast,
    highlight,
    marks_of,
    render_report,
    render_summary,
    summarize,
)
from shellv_core.evaluation.suite import ModelAnswers, flat_metrics, gather, judge
from shellv_core.evaluation.yes_no import score_yes_no
from tests.evaluation.benchmarks.samples import SAMPLES


def results(**verdicts):
    """Results in which the candidate is better, worse or even, by metric."""
    block = score_yes_no({"a": True, "b": False}, {"a": True, "b": False})
    comparison = {metric: {"verdict": verdict} for metric, verdict in verdicts.items()}
    return {
        "models": {"candidate": {"pope": {"random": block}, "pope_blind": {"random": block}}},
        "comparisons": {"candidate_blind": comparison, "without_hacl": comparison},
    }


@pytest.mark.parametrize(
    ("verdict", "blind", "other"),
    [
        ("better", ("good", "The pictures help"), ("good", "is better in POPE random accuracy")),
        ("even", ("bad", "No measurable use"), ("open", "is not measurably different in POPE random accuracy")),
        ("worse", ("bad", "The pictures harm"), ("bad", "is worse in POPE random accuracy")),
    ],
)
def test_summary_says_whichever_wins(verdict, blind, other):
    findings = summarize(results(pope_random_accuracy=verdict))
    assert [kind for kind, _ in findings] == [blind[0], other[0]]
    assert blind[1] in findings[0][1]
    assert other[1] in findings[1][1]


def test_mixed_results_are_told_both_ways():
    kind, sentence = summarize(results(hal_eval_event_accuracy="better", pope_popular_accuracy="worse"))[-1]
    assert kind == "open"
    assert "better in Hal-Eval event accuracy; worse in POPE popular accuracy" in sentence


def test_many_metrics_are_counted_and_not_listed():
    verdicts = {f"pope_{split}_accuracy": "even" for split in "abcdefghi"}
    assert summarize(results(**verdicts))[-1][1].endswith("not measurably different in 9 metrics.")


def test_highlight():
    chair = Chair([{"image": "a.jpg", "objects": ["dog"]}])
    assert highlight(chair, "a.jpg", "A dog, no cat.") == [
        Span("A "),
        Span("dog", "right"),
        Span(", no "),
        Span("cat", "wrong"),
        Span("."),
    ]
    assert highlight(chair, "a.jpg", "") == []


def test_contrast_marks_what_the_other_does_not_say():
    assert contrast("A red dog.", "a blue dog.") == [
        Span("A"),
        Span(" "),
        Span("red", "other"),
        Span(" "),
        Span("dog."),
    ]
    assert contrast("", "x") == []


def test_chart_is_valid_xml_with_escaped_labels():
    from xml.etree import ElementTree

    series = [Series("<a> & b", "#123456", [Bar(0.5, 0.4, 0.6), Bar(0.0)])]
    chart = bar_chart('a "title"', ["x<y", "z"], series, chance=0.5)
    texts = ["".join(element.itertext()) for element in ElementTree.fromstring(chart).iter()]
    assert "<a> & b, x<y: 50.0 % (40.0 to 60.0)" in texts


def test_a_chart_has_room_for_what_is_above_the_whole():
    chart = bar_chart("x", ["a"], [Series("s", "red", [Bar(1.3)])])
    assert ">150<" in chart
    assert ">130.0<" in chart


def picture(seed):
    from PIL import Image

    rng = random.Random(seed)
    buffer = BytesIO()
    Image.new("RGB", (320, 240), tuple(rng.randrange(256) for _ in range(3))).save(buffer, "JPEG")
    return buffer.getvalue()


def open_sample(name, folder):
    """A sample's benchmark with its answers."""
    sample, entry = SAMPLES[name], registry()[name]
    folder.mkdir(parents=True)
    options = sample.options(folder)
    given = {flag[2:].replace("-", "_"): Path(value) for flag, value in zip(options[::2], options[1::2], strict=True)}
    defaults = {option.name: option.choices[0] for option in entry.options if option.choices}
    benchmark = entry.open(sample.questions(folder), **(defaults | given))
    path = folder / "answers.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in sample.rows))
    return benchmark, entry.read(benchmark, path)


def evaluated(names, folder):
    """Evidence and results of the samples' answers as candidate, of nonsense as its blind run and as the baseline."""
    opened = [open_sample(name, folder / name) for name in names]
    benchmarks = [benchmark for benchmark, _ in opened]
    right = {name_of(benchmark): answers for benchmark, answers in opened}
    wrong = {name: dict.fromkeys(answers, "<script>alert(1)</script>") for name, answers in right.items()}
    models = {"candidate": ModelAnswers(right, wrong), "without_hacl": ModelAnswers(wrong, wrong)}
    rows = gather(benchmarks, models, models)
    return benchmarks, rows, judge(benchmarks, models, rows, 0)


class Page(HTMLParser):
    """Collects what a page refers to, its words, and what is open at its end."""

    def __init__(self, content):
        super().__init__()
        self.references, self.open, self.words = [], [], []
        self.feed(content)

    def handle_startendtag(self, tag, attributes):
        assert tag in ("line", "rect", "path")

    def handle_starttag(self, tag, attributes):
        self.references += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "img", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.words.append(data)


@pytest.mark.parametrize("names", [*[[name] for name in SAMPLES], list(SAMPLES)], ids="-".join)
def test_report_of_any_benchmark_and_of_all_at_once(names, tmp_path):
    benchmarks, rows, scores = evaluated(names, tmp_path)
    json.dumps(scores)
    images = {question.image: picture(number) for each in benchmarks for number, question in enumerate(each.questions)}
    content = render_report(scores, rows, images, Lineage("model x"), 4, marks_of(benchmarks))
    page = Page(content)
    assert page.open == []
    assert all(reference.startswith("data:image/jpeg;base64,") for reference in page.references)
    assert 'http-equiv="Content-Security-Policy" content="default-src \'none\'; img-src data:' in content
    assert "<script" not in content
    assert content.count("<article") <= MAX_FAILURES + MAX_DIFFERENCES + 4
    assert len(content) < 2_000_000
    words = "".join(page.words)
    for name in names:
        assert registry()[name].summary.partition(":")[0] in words
    summary = render_summary(scores)
    assert summary.count("| ") > 5 * len(scores["metrics"]["candidate"])
    flat = flat_metrics(scores)
    for metric in scores["metrics"]["candidate"]:
        assert {metric, f"blind_{metric}", f"without_hacl_{metric}", f"without_hacl_blind_{metric}"} <= set(flat)


def test_figures_in_tables_are_those_of_the_scores(tmp_path):
    _, _, scores = evaluated(["amber"], tmp_path)
    made = tables("amber", {"candidate": scores["models"]["candidate"]["amber"]})
    cells = {
        (group, column): text
        for table in made
        for group, _, row in table.lines
        for column, (text, _) in zip(table.columns, row, strict=True)
    }
    assert cells["generative", "CHAIR"] == "40.0"
    assert cells["generative", "authors' cover"] == "50.0"
    assert cells["discriminative all", "accuracy"] == "66.7"
    assert cells["discriminative all", "authors' accuracy"] == "33.3"
    assert cells["all", "amber score"] == "63.3"


def test_published_figures_stand_apart_and_say_whether_they_compare(tmp_path):
    _, _, scores = evaluated(["pope"], tmp_path)
    pope = scores["models"]["candidate"]["pope"]
    few = published("pope", pope, [4])[0]
    assert not few.comparable
    assert few.note == "Not comparable: 4 questions were asked here, 3,000 there."
    # By the authors' rule all four are a yes: precision 1/2, recall 1.
    assert few.own == ["66.7"]
    assert ("LLaVA-1.5 7B", ("85.9",), "LLaVA, docs/MODEL_ZOO.md") in few.lines
    assert published("pope", pope, [3000, 3000, 2910])[0].comparable
    assert published("no such", pope, [4]) == []


def test_every_published_figure_has_a_source_and_fits_its_columns():
    content = json.loads((Path(__file__).parents[2] / "shellv_core/evaluation/published.json").read_text())
    keys = {name.replace("-", "_") for name in registry()}
    assert {table["benchmark"] for table in content} <= keys
    for table in content:
        assert table["protocol"]
        for row in table["rows"]:
            assert row["source"]
            assert len(row["values"]) == len(table["figures"])


def test_confusion_counts_what_was_said_against_what_is_right(tmp_path):
    _, _, scores = evaluated(["pope"], tmp_path)
    # Yes, there is. | NO | There isn't a cup. | Maybe
    assert scores["confusion"]["candidate"]["pope"] == {
        "yes": {"yes": 1, "no": 1, "neither": 0},
        "no": {"yes": 0, "no": 1, "neither": 1},
    }


def test_worst_failures_and_differences_are_those(tmp_path):
    _, rows, scores = evaluated(["pope"], tmp_path)
    content = render_report(scores, rows, {}, Lineage("x"), 0)
    side_by_side, _, failures = content.partition("Worst failures")
    # The first two are right and the baseline's wrong; the last two are wrong, about one image.
    assert side_by_side.count("Is there a dog in the image?") == side_by_side.count("Is there a cat in the image?") == 1
    assert "Is there a cup in the image?" not in side_by_side
    assert failures.count("Is there a cup in the image?") == failures.count("Is there a bus in the image?") == 1
    assert "Is there a dog in the image?" not in failures


def test_the_worst_pictures_come_first_and_nothing_comes_twice(tmp_path):
    from shellv_core.evaluation.benchmarks.pope import Pope

    # Image n of four has n wrong answers; both splits ask the same.
    asked = [(image, number) for image in range(4) for number in range(3)]
    rows = [
        {
            "question_id": f"{image}{number}",
            "image": f"{image}.jpg",
            "text": f"Is {image}{number}?",
            "label": "yes",
        }
        for image, number in asked
    ]
    benchmarks = [Pope(rows, "random"), Pope(rows, "popular")]
    said = {f"{image}{number}": "no" if number < image else "yes" for image, number in asked}
    answers = dict.fromkeys(map(name_of, benchmarks), said)
    models = {"candidate": ModelAnswers(answers, {})}
    evidence = gather(benchmarks, models, models)
    content = render_report(judge(benchmarks, models, evidence, 0), evidence, {}, Lineage("x"), 0)
    failures = content.partition("Worst failures")[2]
    assert [failures.count(f'<div class="absent">{image}.jpg</div>') for image in range(4)] == [0, 1, 1, 1]
    assert failures.index(">3.jpg<") < min(failures.index(">2.jpg<"), failures.index(">1.jpg<"))
    assert failures.count("Is 30?") == 1
