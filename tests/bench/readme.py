"""Puts a real session into the README, and a picture of its report into docs/.

    make run 2>&1 | tee session.txt
    python -m tests.bench.readme session.txt

Needs Chromium for the picture.
"""

from __future__ import annotations

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

BEGIN, END = "<!-- session: written by `python -m tests.bench.readme` from a real run -->\n", "<!-- end of session -->"
CHROMIUM = "/usr/bin/chromium"
CHROMIUM_ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]


def session(text: str) -> str:
    """The session as the README shows it: progress lines left out, the project folder by its name alone."""
    text = text.replace(f"{Path.cwd()}/", "")
    lines = [line for line in text.splitlines() if " ETA " not in line and not line.startswith("make")]
    return f"```\n$ make run\n{chr(10).join(lines).strip()}\n```\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Write README.md and docs/report.png."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("session", type=Path)
    parser.add_argument("--report", type=Path, default=Path(".shellv/report.html"))
    options = parser.parse_args(argv)
    readme = Path("README.md")
    pattern = re.compile(re.escape(BEGIN) + ".*?" + re.escape(END), re.DOTALL)
    replaced = pattern.sub(lambda _: BEGIN + session(options.session.read_text()) + END, readme.read_text())
    readme.write_text(replaced)

    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=CHROMIUM_ARGUMENTS)
        page = browser.new_page(viewport={"width": 1100, "height": 1500})
        page.goto(options.report.absolute().as_uri())
        page.screenshot(path="docs/report.png")
        browser.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
