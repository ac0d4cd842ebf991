"""Passes over a list of a million rows beside `json.load`, and verifies images beside PIL, each pair in one run.

    python -m tests.bench.sources [ROWS]

Prints seconds of CPU, peak memory, microseconds an image, and the ratios.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from shellv_core.data.sources.verify import verified_image
from tests.data.photos import photo_like_jpeg, three_photos

SCAN = """
import sys
from shellv_core.data.sources.config import LlavaSource
from shellv_core.data.sources.opening import open_source
source = open_source(LlavaSource(annotations=sys.argv[1], images=sys.argv[2]))
number = sum(1 for _ in source.scan())
"""
LOAD = """
import json, sys
with open(sys.argv[1], encoding="utf-8") as file:
    number = len(json.load(file))
"""
REPORT = """
import resource
used = resource.getrusage(resource.RUSAGE_SELF)
print(number, used.ru_utime + used.ru_stime, used.ru_maxrss / 1024)
"""
NUM_IMAGES = 1000


def scan(number: int, folder: Path) -> None:
    """Print the cost of `Source.scan` and of the whole list in memory."""
    for each in range(NUM_IMAGES):
        (folder / f"{each:06d}.jpg").touch()
    rows = folder / "rows.json"
    with rows.open("w", encoding="utf-8") as file:
        for each in range(number):
            turns = [
                {"from": "human", "value": "<image>\nWrite a terse but informative summary of the picture."},
                {"from": "gpt", "value": f"a painting of {each} chairs by an unknown artist of the 19th century"},
            ]
            row = {"id": f"{each:09d}", "image": f"{each % NUM_IMAGES:06d}.jpg", "conversations": turns}
            file.write(("," if each else "[") + json.dumps(row))
        file.write("]")
    print(f"{number} rows, {rows.stat().st_size / 1e6:.0f} MB, {NUM_IMAGES} images")
    seconds = []
    for name, program in (("scan", SCAN), ("json.load", LOAD)):
        command = [sys.executable, "-c", program + REPORT, str(rows), str(folder)]
        environment = os.environ | {"SHELLV_HOME": str(folder / "home")}
        told = subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.split()
        seconds.append(float(told[1]))
        print(f"  {name:10} {float(told[1]):6.2f} s of CPU, peak {float(told[2]):5.0f} MB")
    print(f"  scan / json.load: {seconds[0] / seconds[1]:.2f} of its time")


def verify() -> None:
    """Print the cost of a verified and of a plainly decoded image."""

    def by_pil(name: str, data: bytes) -> None:
        with Image.open(io.BytesIO(data)) as image:
            image.load()

    small = io.BytesIO()
    with Image.open(io.BytesIO(photo_like_jpeg(0))) as image:
        image.resize((64, 48)).save(small, "JPEG")
    images = {"64x48": small.getvalue(), "320x240": photo_like_jpeg(0), **three_photos()}
    for name, data in images.items():
        ours, pil = (_microseconds(check, name, data) for check in (verified_image, by_pil))
        print(f"  {name:36} {len(data):7} bytes: verified {ours:6.0f} us, PIL {pil:6.0f} us, {pil / ours:.1f} times")


def _microseconds(check: Callable[[str, bytes], object], name: str, data: bytes) -> float:
    best = float("inf")
    for _ in range(30):
        start = time.perf_counter()
        check(name, data)
        best = min(best, time.perf_counter() - start)
    return best * 1e6


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        scan(int(sys.argv[1]) if sys.argv[1:] else 1_000_000, Path(temporary))
    print("images")
    verify()
