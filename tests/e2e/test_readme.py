"""The README's commands, run as they stand there."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from shellv_core.stages import STAGE_NAMES
from tests.e2e.conftest import REPOSITORY

pytestmark = [pytest.mark.e2e]

README = (REPOSITORY / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\w*\n(.*?)^```$", README, re.DOTALL | re.MULTILINE)


def test_one_stage_at_a_time(tmp_path: Path, project_folder: Path) -> None:
    (block,) = [block for block in BLOCKS if block.count("shellv ") == len(STAGE_NAMES)]
    lines = block.replace("/tmp/shellv-demo", str(tmp_path / "demo")).splitlines()
    assert [line.split()[1] for line in lines] == list(STAGE_NAMES)
    for line in lines:
        program, *arguments = shlex.split(line)
        assert program == "shellv"
        done = subprocess.run(
            [sys.executable, "-m", "shellv_core.cli", *arguments],
            env={**os.environ, "SHELLV_HOME": str(project_folder)},
            capture_output=True,
            text=True,
            timeout=250,
            check=False,
        )
        assert done.returncode == 0, (line, done.stderr)
        assert json.loads(done.stdout)["stage"] == arguments[0]


def test_make_targets_and_files_exist() -> None:
    makefile = (REPOSITORY / "Makefile").read_text(encoding="utf-8")
    for target in [*re.findall(r"`make ([a-z-]+)`", README), "run", "test"]:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"\]\((?!http)([^)]+)\)", README):
        assert (REPOSITORY / path).exists(), path


def test_the_map_names_every_folder() -> None:
    (block,) = [block for block in BLOCKS if block.startswith("shellv_core/")]
    for folder in (path for path in (REPOSITORY / "shellv_core").iterdir() if (path / "__init__.py").exists()):
        assert f"  {folder.name}/" in block, folder.name
    for folder in re.findall(r"^([a-z_]+)/", block, re.MULTILINE):
        assert (REPOSITORY / folder).is_dir(), folder


def test_the_session_is_of_a_real_run() -> None:
    (block,) = [block for block in BLOCKS if block.startswith("$ make run")]
    for expected in ("[11/12] deploy", "POPE adversarial", "@champion", "report.html", "curl -s"):
        assert expected in block
    assert str(REPOSITORY) not in README
