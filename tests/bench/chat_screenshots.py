"""The pictures of docs/chat.md: ``python -m tests.bench.chat_screenshots NAME=REFERENCE NAME=REFERENCE``.

Takes two or more models as `shellv serve --model` does, serves them with the page and drives Chromium through it.
"""

from __future__ import annotations

import io
import sys
import tempfile
from pathlib import Path

from tests.serving.test_ui import ARGUMENTS, CHROMIUM, ask, open_tab, opened, wait_for_the_end

DOCS = Path(__file__).parents[2] / "docs"
QUESTION = "Describe the image."
MAX_BYTES = 200_000


def main(pairs: list[str]) -> None:
    from playwright.sync_api import sync_playwright

    from shellv_core.models.compose import load_model
    from shellv_core.serving.api import create_app
    from shellv_core.serving.http.server import Server, bind, listening_url, running_in_thread
    from shellv_core.serving.models import FixedModels, ServedModel
    from shellv_core.serving.reference import fetch_model
    from shellv_core.serving.transformers_engine import TransformersEngine
    from shellv_core.serving.ui import mount_ui

    served = []
    for pair in pairs:
        name, _, reference = pair.partition("=")
        files = fetch_model(reference)
        served.append(ServedModel(TransformersEngine(*load_model(files.path)), name, files.revision))
    models = FixedModels(*served)
    app = create_app(models)
    with tempfile.TemporaryDirectory() as folder, bind("127.0.0.1", 0) as listener:
        mount_ui(app, listening_url(listener), served[0].name, folder=Path(folder))
        with running_in_thread(Server(app, models), listener) as url, sync_playwright() as playwright:
            browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
            with opened(browser, url, viewport={"width": 1280, "height": 800}) as page:
                compare(page)
                keep(page, "chat-side-by-side")
            with opened(browser, url, viewport={"width": 1280, "height": 860}, color_scheme="dark") as page:
                battle(page)
                keep(page, "chat-arena")
            with opened(browser, url, viewport={"width": 390, "height": 844}, is_mobile=True, locale="zh-CN") as page:
                example(page, 2)
                ask(page, QUESTION)
                wait_for_the_end(page)
                keep(page, "chat-phone")
            browser.close()


def example(page, number):
    page.locator(".gallery-item:visible").nth(number).click()
    page.wait_for_selector(".image-frame img:visible")
    page.locator(".image-frame img:visible").evaluate("image => image.decode().then(() => true)")


def compare(page):
    open_tab(page, "Side by side")
    example(page, 1)
    ask(page, QUESTION)
    wait_for_the_end(page, columns=2)


def battle(page):
    open_tab(page, "Arena")
    example(page, 0)
    ask(page, QUESTION)
    page.wait_for_selector("#vote-left:enabled")
    page.click("#vote-left")
    page.wait_for_selector("#reveal:has-text('A =')")


def keep(page, name):
    """Store a picture in few colors, below the size that a page of documentation should load."""
    from PIL import Image

    page.wait_for_timeout(500)  # fading in
    image = Image.open(io.BytesIO(page.screenshot(full_page="phone" in name))).convert("RGB")
    path = DOCS / f"{name}.png"
    image.quantize(128, dither=Image.Dither.NONE).save(path, optimize=True)
    size = path.stat().st_size
    assert size < MAX_BYTES, f"{path} has {size} bytes"
    print(f"{path} {image.size} {size} bytes")


if __name__ == "__main__":
    main(sys.argv[1:])
