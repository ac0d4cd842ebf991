"""docs/evaluation.md: its table is the registry's, and its commands run as they stand there."""

import json
import re
import shlex

import pytest

from shellv_core.cli import main
from tests.evaluation.benchmarks.document import DOCUMENT, with_table
from tests.evaluation.benchmarks.samples import SAMPLES

TEXT = DOCUMENT.read_text(encoding="utf-8")


def test_the_table_is_todays():
    assert with_table(TEXT) == TEXT, "run python -m tests.evaluation.benchmarks.document"


def test_every_command_works(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    lines = re.findall(r"^shellv .*$", TEXT, re.MULTILINE)
    assert len(lines) > 10
    for line in lines:
        _, *arguments = shlex.split(line)
        if "--help" in arguments:
            with pytest.raises(SystemExit, match="0"):
                main(arguments)
            continue
        name = arguments[arguments.index("--benchmark") + 1] if "--benchmark" in arguments else arguments[1]
        sample = SAMPLES[name]
        sample.questions(tmp_path)
        (tmp_path / f"{sample.name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in sample.rows))
        capsys.readouterr()
        assert main(arguments) == 0, (line, capsys.readouterr().err)
        if "--answers" in arguments:
            json.loads(capsys.readouterr().out)
        for option in ("--upload", "--write-questions", "--html"):
            if option in arguments:
                assert (tmp_path / arguments[arguments.index(option) + 1]).stat().st_size > 0
