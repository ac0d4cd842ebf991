from __future__ import annotations

import re
from pathlib import Path

from pipelines.client import settings
from pipelines.client.outcome import Outcome
from tests.pipelines.kfp_api_server import KfpServer
from tests.submit.submitting_page import CONSOLE, PAGE, comparable, render, surroundings

DOCUMENT = PAGE.read_text(encoding="utf-8")


def test_the_commands_print_what_the_page_says(kfp: KfpServer, tmp_path: Path, bucket_uri: str) -> None:
    with surroundings(tmp_path):
        now = render(DOCUMENT, kfp, bucket_uri)
    assert len(CONSOLE.findall(now)) == 7
    assert comparable(now) == comparable(DOCUMENT), "run `python -m tests.submit.submitting_page` and read what changed"
    assert comparable(DOCUMENT.replace("uploaded", "brought")) != comparable(DOCUMENT)


def test_exit_codes_and_variables_are_complete() -> None:
    codes = {int(code) for code in re.findall(r"^\| (\d+) \|", DOCUMENT, re.MULTILINE)}
    assert codes == {1, 2, *Outcome}
    for name in (
        "ENDPOINT",
        "UI_ENDPOINT",
        "NAMESPACE",
        "CA_FILE",
        "TOKEN",
        "TOKEN_FILE",
        "COOKIE",
        "USER",
        "PASSWORD",
    ):
        assert f"`{getattr(settings, name)}`" in DOCUMENT
