"""Drives the page in a real browser."""

from __future__ import annotations

import shutil
import time

import pytest

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
QUESTION = "textarea[placeholder^=Ask]"

pytestmark = [pytest.mark.browser, pytest.mark.skipif(CHROMIUM is None, reason="no chromium on this machine")]


@pytest.fixture(scope="module")
def server(model_path):
    """Address and engine of a server with the page."""
    from shellv_core.endpoint.client import endpoint_url
    from shellv_core.models.compose import load_model
    from shellv_core.serving.api import create_app
    from shellv_core.serving.http.server import Server, bind, running_in_thread
    from shellv_core.serving.models import FixedModels, ServedModel
    from shellv_core.serving.transformers_engine import TransformersEngine
    from shellv_core.serving.ui import mount_ui

    model, processor = load_model(model_path)
    forward = model.lm_head.forward

    def slow_forward(hidden_states):
        # About as quick as a real model, so that there is time to press Stop.
        time.sleep(0.02)
        return forward(hidden_states)

    model.lm_head.forward = slow_forward
    engine = TransformersEngine(model, processor)
    models = FixedModels(ServedModel(engine, "tiny", "0" * 64))
    app = create_app(models)
    with bind("127.0.0.1", 0) as listener:
        mount_ui(app, endpoint_url(*listener.getsockname()), "tiny")
        with running_in_thread(Server(app, models), listener) as url:
            yield url, engine


@pytest.fixture(scope="module")
def browser():
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def page(browser, server):
    page = browser.new_page()
    page.set_default_timeout(60_000)
    foreign = []
    page.on(
        "request",
        lambda request: None if request.url.startswith((server[0], "data:", "blob:")) else foreign.append(request.url),
    )
    page.goto(f"{server[0]}/ui/")
    page.wait_for_selector(QUESTION)
    yield page
    page.close()
    assert foreign == []


def set_longest_answer(page, tokens):
    page.get_by_text("Parameters").click()
    field = page.get_by_label("number input for Longest answer")
    field.fill(str(tokens))
    field.press("Tab")


def ask(page, text):
    page.fill(QUESTION, text)
    page.press(QUESTION, "Enter")


def wait_for_the_end(page):
    page.wait_for_selector("#figures:has-text('per second')")
    page.wait_for_selector("#send:visible")


def last_answer(page):
    return page.locator(".message.bot").last.inner_text()


def wait_until(condition):
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_conversation_about_a_picture(page, tmp_path, server):
    (tmp_path / "red.png").write_bytes(picture("red"))
    page.set_input_files("input[type=file]", str(tmp_path / "red.png"))
    page.wait_for_selector(".image-frame img")
    set_longest_answer(page, 30)
    ask(page, "what is in this picture ?")
    wait_for_the_end(page)
    first = last_answer(page)
    assert first
    page.click("#retry")
    page.wait_for_selector("#stop:visible")
    wait_for_the_end(page)
    assert last_answer(page) == first
    ask(page, "and the table ?")
    page.wait_for_selector("#stop:visible")
    wait_for_the_end(page)
    assert page.locator(".message.bot").count() == 2
    (tmp_path / "blue.png").write_bytes(picture("blue"))
    page.get_by_label("Clear").first.click()
    page.set_input_files("input[type=file]", str(tmp_path / "blue.png"))
    page.wait_for_selector("text=Choose a picture and ask")


def test_stop_frees_the_engine_and_keeps_what_came(page, server):
    engine = server[1]
    cancelled = engine.stats().cancelled
    set_longest_answer(page, 2000)
    ask(page, "hello")
    page.wait_for_selector("#stop:visible")
    page.wait_for_selector(".message.bot")
    page.click("#stop")
    wait_until(lambda: engine.stats().cancelled == cancelled + 1 and not engine.stats().running)
    page.wait_for_selector("#send:visible")
    assert last_answer(page)


def test_a_refusal_is_shown_and_the_page_goes_on(page):
    page.get_by_text("Parameters").click()
    page.get_by_label("Seed").fill("seven")
    ask(page, "hello")
    page.wait_for_selector("text=is not a whole number")
    page.wait_for_selector("#send:visible")
    page.get_by_label("Seed").fill("7")
    page.click("#retry")
    wait_for_the_end(page)


def test_leaving_the_page_frees_the_engine(page, server):
    engine = server[1]
    cancelled = engine.stats().cancelled
    set_longest_answer(page, 2000)
    ask(page, "hello")
    wait_until(lambda: engine.stats().running)
    page.goto("about:blank")
    wait_until(lambda: engine.stats().cancelled == cancelled + 1)
