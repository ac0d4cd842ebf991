from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from shellv_core import storage
from shellv_core.config import build_config
from shellv_core.data.config import LlavaSource, ScenesSource
from shellv_core.data.preparation import prepare, with_content_stamp
from shellv_core.data.shards import read_shards
from shellv_core.errors import ConfigError, DataError
from shellv_core.storage import InputDirectory, Manifest, OutputDirectory
from tests.data.photos import photo_like_jpeg

SCENES = ScenesSource(num_train=40, num_validation=30, benchmark_images=8)


def prepared(
    folder: Path, scenes: Any = None, llava: Any = None, samples_per_shard: int = 512, seed: int = 0
) -> InputDirectory:
    """What prepare writes to `folder`, committed; settings may be plain mappings."""
    output = OutputDirectory(folder.as_uri(), "f")
    output.begin()
    scenes = build_config(ScenesSource, scenes) if isinstance(scenes, dict) else scenes
    llava = build_config(LlavaSource, llava) if isinstance(llava, dict) else llava
    work = folder.with_name(f"{folder.name}-work")
    work.mkdir(exist_ok=True)
    details = prepare(scenes, llava, samples_per_shard, seed, output, work).details()
    output.commit(Manifest(stage="t", fingerprint="f", library_version="0", created_at="", config={}, details=details))
    return InputDirectory(folder.as_uri())


def turns(question: str = "<image>\nWhat is shown?") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "A photo."}]


def test_the_seed_decides_and_the_shard_size_does_not_change_samples(tmp_path: Path) -> None:
    def samples(name: str, **changes: Any) -> list[Any]:
        return list(read_shards(prepared(tmp_path / name, scenes=SCENES, **changes), "train"))

    first = samples("a")
    assert first == samples("b", samples_per_shard=7)
    assert first != samples("c", seed=1)


def test_no_good_row_fails_even_where_all_may_be_bad(tmp_path: Path) -> None:
    (tmp_path / "rows.json").write_text('[{"id": "a"}]')
    llava = LlavaSource(annotations=str(tmp_path / "rows.json"), image_folder=str(tmp_path), max_rejected_fraction=1.0)
    with pytest.raises(DataError, match="not one of 1 rows is good"):
        prepared(tmp_path / "out", llava=llava)


def test_rows_can_be_split_and_joined_with_scenes(tmp_path: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.jpg").write_bytes(photo_like_jpeg(0))
    rows = [{"id": str(n), "conversations": turns(f"Question {n}?")} for n in range(60)]
    rows += [{"id": "i", "image": "a.jpg", "conversations": turns()}] * 2
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    llava = LlavaSource(
        annotations=(tmp_path / "rows.json").as_uri(),
        image_folder=images.as_uri(),
        validation_fraction=0.3,
        max_rejected_fraction=0.1,
    )
    source = prepared(tmp_path / "out", scenes=SCENES, llava=llava, samples_per_shard=20)
    ids = {
        split: [s.id for s in read_shards(source, split) if s.source != "scenes"] for split in ("train", "validation")
    }
    assert sorted(ids["train"] + ids["validation"]) == sorted([*(str(n) for n in range(60)), "i"])
    assert 5 < len(ids["validation"]) < 35
    assert [row["reason"] for row in source.manifest.details["rejected"]] == ["duplicate row"]
    assert source.manifest.details["splits"]["train"]["num_samples"] == 40 + len(ids["train"])


PROGRAM = """
import json, pathlib, sys
from tests.data.test_preparation import prepared

if __name__ == "__main__":
    prepared(pathlib.Path(sys.argv[1]), **json.loads(sys.argv[2]))
"""


@pytest.mark.parametrize("kind", ["scenes", "llava"])
def test_killed_runs_go_on_and_end_with_the_same_bytes(kind: str, tmp_path: Path) -> None:
    values: dict[str, Any]
    if kind == "scenes":
        # Enough scenes for worker processes.
        looks = {"image_size": 64, "existence_turns": 2}
        sizes = {"num_train": 1000, "num_validation": 30, "benchmark_images": 8}
        values = {"scenes": {**sizes, "scenes": looks}, "samples_per_shard": 100}
    else:
        images = tmp_path / "images"
        images.mkdir()
        for number in range(4):
            (images / f"{number}.jpg").write_bytes(photo_like_jpeg(number, (1200, 900)))
        (images / "bad.jpg").write_bytes(photo_like_jpeg(0)[:2000])
        rows = [
            {"id": str(n), "image": "bad.jpg" if n % 10 == 3 else f"{n % 4}.jpg", "conversations": turns()}
            for n in range(400)
        ]
        (tmp_path / "rows.json").write_text(json.dumps(rows))
        source = {"annotations": str(tmp_path / "rows.json"), "image_folder": str(images), "max_rejected_fraction": 0.2}
        values = {"llava": source, "samples_per_shard": 20}
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    command = [sys.executable, str(program), str(killed), json.dumps(values)]
    process = subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(Path.cwd())}, start_new_session=True)
    try:
        deadline = time.monotonic() + 120
        while len(list(killed.glob("train/*.tar"))) < 3:
            assert process.poll() is None, "ended before it could be killed"
            assert time.monotonic() < deadline
            time.sleep(0.005)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    _wait_until_gone(process.pid)
    assert not (killed / "manifest.json").exists()
    finished = {path: path.stat().st_mtime_ns for path in killed.glob("train/train-00000[01].tar")}
    assert len(finished) == 2

    first = prepared(killed, **values)
    assert {path: path.stat().st_mtime_ns for path in finished} == finished, "finished shards were written again"
    second = prepared(whole, **values)
    assert first.files() == second.files()
    assert first.manifest.details == second.manifest.details


def _wait_until_gone(group: int) -> None:
    """Wait until no worker process of a killed run is left."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return
        time.sleep(0.05)
    raise AssertionError("worker processes outlive the run that started them")


def test_rows_and_images_may_lie_in_an_object_store(bucket_uri: str, tmp_path: Path) -> None:
    photo = photo_like_jpeg(5)
    rows = [{"id": name, "image": name, "conversations": turns()} for name in ("sub/a.jpg", "gone.jpg")]
    storage.write_bytes(f"{bucket_uri}/in/rows.json", json.dumps(rows).encode())
    storage.write_bytes(f"{bucket_uri}/in/images/sub/a.jpg", photo)
    llava = with_content_stamp(
        LlavaSource(
            annotations=f"{bucket_uri}/in/rows.json",
            image_folder=f"{bucket_uri}/in/images",
            max_rejected_fraction=0.5,
        )
    )
    source = prepared(tmp_path / "out", llava=llava)
    assert [sample.image for sample in read_shards(source, "train")] == [photo]
    assert [row["reason"] for row in source.manifest.details["rejected"]] == ["image file missing"]
    with pytest.raises(ConfigError, match=r"llava\.annotations=.*no such object.*llava\.image_folder=.*no-such-bucket"):
        with_content_stamp(LlavaSource(annotations=f"{bucket_uri}/none.json", image_folder="s3://no-such-bucket/x"))
