"""The writer of shards, killed at random points, over and over."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

from tests.data.photos import photo_like_jpeg

NUM_KILLS = 20
NUM_ROWS = 6000

PROGRAM = """
import sys
from shellv_core.config import apply_overrides
from shellv_core.stages.prepare_data import PrepareDataConfig, run

if __name__ == "__main__":
    scenes = {"num_train": 1, "num_validation": 1, "benchmark_images": 1}
    run(apply_overrides(PrepareDataConfig(scenes=scenes), ["scenes=null", *sys.argv[1:]]))
"""


def test_20_kills_change_no_byte_of_shards_index_and_manifest(tmp_path: Path, tracking_store: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(24):
        (images / f"{number}.jpg").write_bytes(photo_like_jpeg(number, (300, 200)))
    (images / "bad.jpg").write_bytes(photo_like_jpeg(0)[:900])
    rows = [
        {
            "id": str(n),
            "image": "bad.jpg" if n % 50 == 7 else f"{n % 24}.jpg",
            "conversations": [{"from": "human", "value": f"<image>\n{n}?"}, {"from": "gpt", "value": "A photo."}],
        }
        for n in range(NUM_ROWS)
    ]
    annotations = tmp_path / "rows.json"
    annotations.write_text(json.dumps(rows))
    output = tmp_path / "out"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [
        sys.executable,
        str(program),
        f"llava.annotations={annotations}",
        f"llava.images={images}",
        f"output_uri={output.as_uri()}",
        "samples_per_shard=40",
        "validation_fraction=0.3",
        "max_rejected_fraction=0.05",
    ]
    chance = random.Random(0)
    kills = 0
    unfinished: set[int] = set()
    while kills < NUM_KILLS:
        process = _start(command)
        # Some shards later, so that the kill falls into the writing and not into the start of the processes.
        wanted = len(list(output.glob("train/*.tar"))) + chance.randint(0, 10)
        while process.poll() is None and len(list(output.glob("train/*.tar"))) < wanted:
            time.sleep(0.002)
        time.sleep(chance.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += process.returncode == -signal.SIGKILL
        unfinished.add(len(list(output.glob("train/*.tar"))))
        if (output / "manifest.json").exists():
            # Finished before its time: from the start again, until there were enough kills.
            _remove(output)
    assert len(unfinished) > 10, "the kills did not fall into the writing"
    process = _start(command)
    assert process.wait() == 0
    killed = _content(output)
    _remove(output)
    process = _start(command)
    assert process.wait() == 0
    # By name first: comparing megabytes as text would take pytest longer than the kills.
    whole = _content(output)
    assert [name for name in whole.keys() | killed.keys() if whole.get(name) != killed.get(name)] == []
    assert {name.partition("/")[0] for name in killed} == {
        "index", "manifest.json", "plan.json", "rejected.jsonl", "train", "validation",
    }  # fmt: skip


def _start(command: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path.cwd())})


def _content(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # Which run made it is all that may differ.
    manifest = json.loads(found["manifest.json"])
    assert manifest.pop("origin")
    return found | {"manifest.json": json.dumps(manifest).encode()}


def _remove(folder: Path) -> None:
    folder.rename(folder.with_name(f"{folder.name}-{time.monotonic_ns()}"))
