"""The report in a real browser: readable at desktop and phone width, and it asks no host for anything."""

import shutil

import pytest

from shellv_core.evaluation.report import Lineage, marks_of, render_comparison, render_report
from tests.evaluation.benchmarks.samples import SAMPLES
from tests.evaluation.test_report import evaluated, picture

CHROMIUM = shutil.which("chromium")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Paths of a report about all benchmarks and of a comparison."""
    from shellv_core.evaluation.evidence import compare

    folder = tmp_path_factory.mktemp("pages")
    benchmarks, rows, scores = evaluated(list(SAMPLES), folder / "files")
    images = {question.image: picture(number) for each in benchmarks for number, question in enumerate(each.questions)}
    both = rows["candidate"], rows["without_hacl"]
    metrics = scores["metrics"]
    contents = {
        "report": render_report(scores, rows, images, Lineage("model x"), 4, marks_of(benchmarks)),
        "comparison": render_comparison(
            ("a", "b"), both, (metrics["candidate"], metrics["without_hacl"]), compare(*both), images
        ),
    }
    for name, content in contents.items():
        (folder / f"{name}.html").write_text(content)
    return {name: folder / f"{name}.html" for name in contents}


@pytest.mark.parametrize("name", ["report", "comparison"])
@pytest.mark.parametrize("width", [1280, 390])
def test_page_fits_and_asks_no_host(name, width, pages):
    from playwright.sync_api import sync_playwright

    requests, complaints = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        page = browser.new_page(viewport={"width": width, "height": 900})
        page.on("request", lambda request: requests.append(request.url))
        page.on("console", lambda message: complaints.append(message.text))
        page.goto(pages[name].as_uri())
        page.evaluate("document.querySelectorAll('details').forEach(each => each.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") == width, (
            "the page itself does not scroll sideways"
        )
        charts = page.evaluate(
            "[...document.querySelectorAll('svg')].map(each => each.getBoundingClientRect()).map(box =>"
            " [box.left, box.right, box.width, box.height])"
        )
        # Nothing of the three that need a judge can be read in the baseline.
        assert len(charts) >= len(SAMPLES) - 3
        for left, right, wide, high in charts:
            assert 0 <= left < right <= width
            assert wide > 280, "its text stays readable"
            assert high > 30
        loaded = page.evaluate("[...document.images].map(each => each.complete && each.naturalWidth > 0)")
        assert loaded
        assert all(loaded)
        colors = page.evaluate("[...document.querySelectorAll('svg rect')].map(each => getComputedStyle(each).fill)")
        assert "rgb(47, 91, 208)" in colors
        browser.close()
    assert [url for url in requests if not url.startswith("data:")] == [pages[name].as_uri()]
    assert complaints == []
