"""Drives the page in a real browser: two models of one random checkpoint, about as quick as real ones."""

from __future__ import annotations

import contextlib
import json
import shutil
import time

import pytest

from shellv_core.serving.page.votes import VoteLog
from tests.serving.tiny_model import picture

CHROMIUM = shutil.which("chromium")
ARGUMENTS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
NAMES = ("tiny-one", "tiny-two")

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


@pytest.fixture(scope="module")
def server(model_path, tmp_path_factory):
    """Address, engines and folder of a server with the page."""
    from shellv_core.models.compose import load_model
    from shellv_core.serving.api import create_app
    from shellv_core.serving.http.server import Server, bind, listening_url, running_in_thread
    from shellv_core.serving.models import FixedModels, ServedModel
    from shellv_core.serving.transformers_engine import TransformersEngine
    from shellv_core.serving.ui import mount_ui

    folder = tmp_path_factory.mktemp("page")
    engines = []
    for _ in NAMES:
        model, processor = load_model(model_path)
        slow_down(model.lm_head)
        engines.append(TransformersEngine(model, processor))
    models = FixedModels(
        *(
            ServedModel(engine, name, str(index) * 64)
            for index, (name, engine) in enumerate(zip(NAMES, engines, strict=True))
        )
    )
    app = create_app(models)
    with bind("127.0.0.1", 0) as listener:
        mount_ui(app, listening_url(listener), NAMES[0], folder=folder)
        with running_in_thread(Server(app, models), listener) as url:
            yield url, engines, folder


def slow_down(head):
    forward = head.forward

    def slow_forward(hidden_states):
        time.sleep(0.02)  # so that there is time to press Stop
        return forward(hidden_states)

    head.forward = slow_forward


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser, url, path="/ui/", **options):
    """The page in a browser of its own that asks no other host for anything."""
    context = browser.new_context(**options)
    page = context.new_page()
    page.set_default_timeout(60_000)
    foreign = []
    page.on(
        "request",
        lambda request: None if request.url.startswith((url, "data:", "blob:")) else foreign.append(request.url),
    )
    page.goto(f"{url}{path}")
    page.wait_for_function("document.querySelector('#chat-model-0 input')?.value")
    yield page
    context.close()
    assert foreign == []


@pytest.fixture
def page(browser, server):
    with opened(browser, server[0]) as page:
        yield page


@pytest.fixture
def red(tmp_path):
    (tmp_path / "red.png").write_bytes(picture("red"))
    return str(tmp_path / "red.png")


def open_tab(page, name):
    page.get_by_role("tab", name=name).click()
    page.wait_for_selector(f"#{ {'Side by side': 'compare', 'Arena': 'arena'}[name] }-question:visible")


def show(page, path):
    page.get_by_role("tabpanel").locator("visible=true").locator("input[type=file]").first.set_input_files(path)
    page.wait_for_selector(".image-frame img:visible")


def tab_of(page):
    return next(each for each in ("chat", "compare", "arena") if page.locator(f"#{each}-question").is_visible())


def set_longest_answer(page, tokens):
    """Of every column that is shown."""
    for each in page.locator("button.label-wrap:visible", has_text="Parameters").all():
        each.click()
    for field in page.get_by_label("number input for Longest answer").locator("visible=true").all():
        field.fill(str(tokens))
        field.press("Tab")


def ask(page, text):
    box = page.locator(f"#{tab_of(page)}-question textarea")
    box.fill(text)
    box.press("Enter")


def wait_for_the_end(page, columns=1):
    tab = tab_of(page)
    for index in range(columns):
        page.wait_for_selector(f"#{tab}-figures-{index}:has-text(' tok')")
    page.wait_for_selector(f"#{tab}-send:visible")


def regenerate(page):
    tab = tab_of(page)
    page.click(f"#{tab}-regenerate")
    page.wait_for_selector(f"#{tab}-stop:visible")


def answers(page, talk):
    return page.locator(f"#{talk} .message.bot").all_inner_texts()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_conversation_about_a_picture(page, red):
    show(page, red)
    set_longest_answer(page, 30)
    ask(page, "what is in this picture ?")
    wait_for_the_end(page)
    first = answers(page, "chat-talk-0")
    assert len(first) == 1
    assert first[0]
    figures = page.locator("#chat-figures-0").inner_text()
    assert "TTFT" in figures
    assert "30 tok" in figures.replace("\n", " ")
    assert "/ 4096" in figures
    regenerate(page)
    wait_for_the_end(page)
    assert answers(page, "chat-talk-0") == first
    ask(page, "and the table ?")
    page.wait_for_selector("#chat-stop:visible")
    wait_for_the_end(page)
    assert len(answers(page, "chat-talk-0")) == 2
    page.click("#chat-undo")
    wait_until(lambda: answers(page, "chat-talk-0") == first)
    assert page.locator("#chat-question textarea").input_value() == "and the table ?"

    # Edit the question, and it is sent again.
    page.locator("#chat-talk-0 button[aria-label='Edit']").first.click()
    page.locator("#chat-talk-0 textarea").fill("hello world")
    page.locator("#chat-talk-0 button[aria-label='Submit']").click()
    wait_until(lambda: page.locator("#chat-talk-0 .message.user").all_inner_texts() == ["hello world"])
    page.wait_for_selector("#chat-send:visible")
    wait_until(lambda: answers(page, "chat-talk-0") not in ([], first))

    # The browser brings the conversation and its picture back.
    page.wait_for_selector("#chat-send:visible")
    kept = answers(page, "chat-talk-0")
    page.reload()
    wait_until(lambda: answers(page, "chat-talk-0") == kept)
    page.wait_for_selector(".image-frame img:visible")
    page.locator("button[aria-label='Remove Image']:visible, button[aria-label='Clear']:visible").first.click()
    page.wait_for_selector("text=Choose a picture and ask")


def test_two_models_side_by_side(page, red, server, tmp_path):
    open_tab(page, "Side by side")
    assert [page.locator(f"#compare-model-{index} input").input_value() for index in range(2)] == list(NAMES)
    show(page, red)
    set_longest_answer(page, 20)
    page.get_by_label("number input for Temperature").locator("visible=true").nth(1).fill("2")
    ask(page, "what is in this picture ?")
    wait_for_the_end(page, columns=2)
    greedy, drawn = answers(page, "compare-talk-0"), answers(page, "compare-talk-1")
    assert greedy
    assert drawn
    assert greedy != drawn
    page.locator("#compare-talk-1 button[aria-label='Retry']").click()
    wait_until(lambda: answers(page, "compare-talk-1") not in ([], drawn))
    page.wait_for_selector("#compare-send:visible")
    assert answers(page, "compare-talk-0") == greedy

    page.click("#compare-export")
    page.wait_for_selector("#compare-files a")
    texts = {}
    for link in page.locator("#compare-files a").all():
        with page.expect_download() as download:
            link.click()
        texts[download.value.suggested_filename.rpartition(".")[2]] = download.value.path().read_text()
    talks = json.loads(texts["json"])["talks"]
    assert [talk["model"] for talk in talks] == list(NAMES)
    assert talks[0]["turns"][1]["content"].strip() == greedy[0].strip()
    assert talks[1]["options"]["temperature"] == 2
    assert "## tiny-two" in texts["md"]

    page.click("#compare-share")
    field = page.locator("#compare-address textarea, #compare-address input")
    wait_until(lambda: field.count() and "?share=" in field.input_value())
    page.goto(field.input_value())
    page.wait_for_selector(".shared:has-text('what is in this picture ?')")


def test_stop_frees_both_engines_and_keeps_what_came(page, server):
    engines = server[1]
    cancelled = [engine.stats().cancelled for engine in engines]
    open_tab(page, "Side by side")
    set_longest_answer(page, 2000)
    ask(page, "hello")
    page.wait_for_selector("#compare-stop:visible")
    for index in range(2):
        page.wait_for_selector(f"#compare-talk-{index} .message.bot")
    page.click("#compare-stop")
    wait_until(lambda: [engine.stats().cancelled for engine in engines] == [before + 1 for before in cancelled])
    wait_until(lambda: not any(engine.stats().running for engine in engines))
    page.wait_for_selector("#compare-send:visible")
    assert answers(page, "compare-talk-0")


def test_a_blind_battle_is_voted_on_and_rated(page, red, server):
    open_tab(page, "Arena")
    show(page, red)
    set_longest_answer(page, 12)
    ask(page, "what is in this picture ?")
    page.wait_for_selector("#vote-left:enabled")
    shown = page.locator("#arena-talk-A").inner_text() + page.locator("#arena-talk-B").inner_text()
    battle = page.locator("#reveal").inner_text() + page.locator("#arena-figures-A").inner_text()
    assert "tiny" not in shown + battle
    page.click("#vote-right")
    page.wait_for_selector("#reveal:has-text('tiny-one')")
    assert "tiny-two" in page.locator("#reveal").inner_text()
    assert page.locator("#vote-right").is_disabled()

    (vote,) = VoteLog(server[2] / "votes").read()
    assert vote.verdict == "right"
    assert {vote.left.model, vote.right.model} == set(NAMES)
    assert vote.left.revision in {"0" * 64, "1" * 64}
    assert VoteLog(server[2] / "votes").image(vote.image).read_bytes() == picture("red")
    assert "127.0.0.1" not in vote.model_dump_json()
    page.get_by_role("tab", name="Ratings").click()
    page.wait_for_selector("#rating-table:has-text('tiny-two')")
    table = page.locator("#rating-table").inner_text()
    assert table.index(vote.right.model) < table.index(vote.left.model)


def test_a_refusal_is_shown_and_the_page_goes_on(page):
    set_longest_answer(page, 8)
    page.get_by_label("Seed").first.fill("seven")
    ask(page, "hello")
    page.wait_for_selector("text=is not a whole number")
    page.wait_for_selector("#chat-send:visible")
    page.get_by_label("Seed").first.fill("7")
    page.click("#chat-regenerate")
    wait_for_the_end(page)


def test_leaving_the_page_frees_the_engine(page, server):
    engine = server[1][0]
    cancelled = engine.stats().cancelled
    set_longest_answer(page, 2000)
    ask(page, "hello")
    wait_until(lambda: engine.stats().running)
    page.goto("about:blank")
    wait_until(lambda: engine.stats().cancelled == cancelled + 1)


def test_a_phone_in_the_dark(browser, server):
    with opened(
        browser, server[0], viewport={"width": 390, "height": 844}, color_scheme="dark", is_mobile=True
    ) as page:
        open_tab(page, "Side by side")
        page.locator(".gallery-item:visible").first.click()
        page.wait_for_selector(".image-frame img:visible")
        wait_until(lambda: page.locator("#compare-question textarea").input_value())
        assert page.locator(".image-frame img:visible").evaluate("image => image.decode().then(() => true)")
        ask(page, "hello")
        wait_for_the_end(page, columns=2)
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        boxes = [page.locator(f"#compare-talk-{index}").bounding_box() for index in range(2)]
        assert boxes[1]["y"] >= boxes[0]["y"] + boxes[0]["height"]
        color = page.evaluate("getComputedStyle(document.body).backgroundColor")
        assert max(int(each) for each in color.strip("rgba()").split(",")[:3]) < 60


def test_what_may_be_made_up_is_shown(page, red):
    show(page, red)
    page.get_by_label("Show what may be made up").locator("visible=true").check()
    ask(page, "what is in this picture ?")
    wait_for_the_end(page)
    page.wait_for_selector("#chat-view-0")
    view, answer = page.locator("#chat-view-0").inner_text(), answers(page, "chat-talk-0")[0]
    assert answer.split()[0] in view


def test_the_page_speaks_chinese(browser, server):
    with opened(browser, server[0], locale="zh-CN") as page:
        page.wait_for_selector("#chat-send:has-text('发送')")
        assert page.get_by_role("tab").all_inner_texts()[:3] == ["对话", "并排比较", "竞技场"]
