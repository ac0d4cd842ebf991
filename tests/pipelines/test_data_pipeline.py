"""Data written by many tasks is that of one task, byte for byte."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shellv_core.stages import prepare_data
from shellv_core.stages.presets import stage_config
from tests.data.photos import photo_like_jpeg

REPOSITORY = Path(__file__).resolve().parents[2]
# A process of its own: kfp.local takes over logging and the working folder.
PROGRAM = """
import json, sys
from pathlib import Path
from pipelines.compile import compiled_yaml
from pipelines.local import run_tasks

if __name__ == "__main__":
    outputs, _ = run_tasks(compiled_yaml("shellv-data"), json.loads(sys.argv[1]))
    Path(sys.argv[2]).write_text(json.dumps(outputs))
"""


def content(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    # Which run made it is all that may differ.
    manifest = json.loads(found["manifest.json"])
    assert manifest.pop("origin")
    return found | {"manifest.json": json.dumps(manifest).encode()}


@pytest.mark.e2e
def test_a_fan_out_makes_what_one_task_makes(tmp_path: Path, tracking_store: Path) -> None:
    images = tmp_path / "images"
    images.mkdir()
    for number in range(12):
        (images / f"{number}.jpg").write_bytes(photo_like_jpeg(number))
    rows = [
        {
            "id": str(n),
            "image": f"{n % 13}.jpg",
            "conversations": [{"from": "human", "value": f"<image>\n{n}?"}, {"from": "gpt", "value": "A photo."}],
        }
        for n in range(130)
    ]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    overrides = [
        f"prepare_data.llava.annotations={tmp_path / 'rows.json'}",
        f"prepare_data.llava.images={images}",
        "prepare_data.samples_per_shard=10",
        "prepare_data.max_rejected_fraction=0.1",
        "prepare_data.validation_fraction=0.2",
    ]
    root = tmp_path / "root"
    arguments = {"root_uri": root.as_uri(), "preset": "smoke", "overrides": overrides, "data_num_ranges": 3}
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    answer = tmp_path / "outputs.json"
    command = [sys.executable, str(program), json.dumps(arguments), str(answer)]
    done = subprocess.run(
        command, cwd=tmp_path, env=_environment(), capture_output=True, text=True, timeout=280, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    uri = json.loads(answer.read_text())["prepare-data"]
    folder = Path(uri.removeprefix("file://"))
    assert folder.parent == root / "prepare_data"
    many = content(folder)
    assert len([name for name in many if name.startswith("train/")]) > 13

    folder.rename(tmp_path / "many")
    config = stage_config(
        "smoke", "prepare_data", overrides, output_uri=f"{root.as_uri()}/prepare_data/{{fingerprint}}"
    )
    result = prepare_data.run(config)
    assert not result.reused
    assert result.output_uri == uri
    assert content(folder) == many


def _environment() -> dict[str, str]:
    import os

    return os.environ | {"PYTHONPATH": str(REPOSITORY)}
