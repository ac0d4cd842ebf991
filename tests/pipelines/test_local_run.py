from __future__ import annotations

from pathlib import Path

import pytest

from pipelines.__main__ import main
from pipelines.local import run
from shellv_core.errors import ConfigError


def test_a_wrong_setting_is_refused_before_anything_starts(project_folder: Path) -> None:
    with pytest.raises(ConfigError, match="did you mean 'finetune'"):
        run("smoke", ["finetun.seed=1"])
    with pytest.raises(ConfigError, match="unknown preset 'nan'; did you mean 'nano'"):
        run("nan")
    assert not project_folder.exists()


def test_text_that_kfp_would_replace_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="python3"):
        run("smoke", root_uri="file:///opt/python3/x")
    monkeypatch.setenv("SHELLV_HOME", str(tmp_path / "python3.11"))
    with pytest.raises(ConfigError, match="SHELLV_HOME"):
        run("smoke")


def test_a_failing_stage_ends_the_run_with_its_message(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tracking_store: Path, project_folder: Path
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "nobody")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "nothing")
    assert main(["run", "--preset", "smoke"]) == 1
    output = capsys.readouterr()
    assert "preflight\n" in output.out
    assert "prepare data" not in output.out
    assert "report: run local-" in output.out
    assert "Traceback" not in output.out + output.err
    assert output.err.startswith("pipelines: preflight: 1 fault(s), and nothing was started:\nobject store: ")
    assert "http://127.0.0.1:9" in output.err
    assert "Traceback" in (project_folder / "logs" / "run.log").read_text(encoding="utf-8")


def test_exit_codes_tell_settings_from_failures(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["run", "--preset", "nan"]) == 2
    assert "did you mean 'nano'" in capsys.readouterr().err
