"""Runs the benches of data and training and writes what they print to docs/data-figures.md.

``python -m tests.bench.data_figures [NAME ...]`` runs all of them, or the named ones and keeps the others' figures.
"""

from __future__ import annotations

import argparse
import datetime
import os
import platform
import re
import subprocess
import sys
from pathlib import Path

PATH = Path(__file__).resolve().parents[2] / "docs" / "data-figures.md"
BENCHES = {
    "preparing": "Writing shards",
    "sources": "Passing over a source, verifying images",
    "reading": "Reading, decoding, tokenizing and packing",
    "packing": "Token share and shuffle of packed plans",
    "packed_training": "Training from packs",
    "hacl_step": "A HACL step in one pass",
}
HEADER = """# Figures of data and training

Written by `python -m tests.bench.data_figures` (`make bench-data`). Ratios have both sides in one run; absolute figures
are those of the machine named below each.
"""


def run(name: str) -> str:
    """The section of one bench, made now."""
    command = [sys.executable, "-m", f"tests.bench.{name}"]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}"
    return f"## {BENCHES[name]}\n\n{datetime.date.today()}, {machine}:\n\n```\n{done.stdout.strip()}\n```\n"


def sections() -> dict[str, str]:
    """The sections that the document has, by bench."""
    found = re.split(r"^(?=## )", PATH.read_text(encoding="utf-8") if PATH.exists() else "", flags=re.MULTILINE)
    titles = {title: name for name, title in BENCHES.items()}
    return {titles[each[3:].partition("\n")[0]]: each for each in found if each[3:].partition("\n")[0] in titles}


def main() -> None:
    """Run and write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", choices=[[], *BENCHES], metavar="NAME", help=", ".join(BENCHES))
    names = parser.parse_args().names or list(BENCHES)
    known = sections()
    for name in names:
        known[name] = run(name)
        text = "\n".join([HEADER, *(known[each].strip() + "\n" for each in BENCHES if each in known)])
        PATH.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
