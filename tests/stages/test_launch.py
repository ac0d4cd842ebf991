from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from shellv_core.errors import ConfigError, TrainingError
from shellv_core.stages import finetune, launch, pretrain_projector
from shellv_core.stages.launch import LaunchConfig, run_training
from shellv_core.stages.presets import stage_config
from shellv_core.storage import InputDirectory
from tests.stages.training_data import MODEL, TRAINING, write_data

ROOT = Path(__file__).resolve().parents[2]
TWO = LaunchConfig(processes_per_node=2)
#: What a component does in its container.
PROGRAM = """
import sys
from shellv_core.logs import setup_logging
from shellv_core.stages.launch import LaunchConfig, run_training
from shellv_core.stages.pretrain_projector import PretrainProjectorConfig

setup_logging()
config = PretrainProjectorConfig.model_validate_json(sys.stdin.read())
print(run_training("pretrain_projector", config, LaunchConfig(processes_per_node=2)).model_dump_json())
"""


@pytest.fixture(autouse=True)
def _importable(monkeypatch: pytest.MonkeyPatch, tracking_store: Path) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


def config(folder: Path, **training: object) -> pretrain_projector.PretrainProjectorConfig:
    write_data((folder / "data").as_uri())
    return pretrain_projector.PretrainProjectorConfig(
        data_uri=(folder / "data").as_uri(),
        output_uri=f"{folder.as_uri()}/model/{{fingerprint}}",
        model=MODEL,
        training=TRAINING.model_copy(update={"max_steps": 2, **training}),
    )


def test_two_processes_then_the_same_output_again(tmp_path, capfd):
    settings = config(tmp_path)
    result = run_training("pretrain_projector", settings, TWO)
    said = capfd.readouterr()
    assert result.details["num_processes"] == 2
    assert result.metrics["loss"] > 0
    assert not result.reused
    assert "pretrain_projector: writing" in said.err, "the processes' log is not passed on"
    assert InputDirectory(result.output_uri).manifest.fingerprint == result.fingerprint
    again = run_training("pretrain_projector", settings, TWO)
    assert again.reused
    assert again.model_copy(update={"reused": False}) == result
    # The identity is that of the stage alone: this one finds the same output.
    assert run_training("pretrain_projector", settings, LaunchConfig(processes_per_node=1)).reused


def test_a_fault_comes_with_the_message_of_the_process_that_had_it(tmp_path, monkeypatch):
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(TrainingError, match=r"pretrain_projector failed in 2 processes: MLflow at http://127.0.0.1:9"):
        run_training("pretrain_projector", config(tmp_path), TWO)


def test_sigterm_is_passed_on_and_the_next_try_goes_on(tmp_path, project_folder, caplog):
    settings = config(tmp_path, max_steps=120, checkpoint_every_steps=5)
    with subprocess.Popen(
        [sys.executable, "-c", PROGRAM],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdin.write(settings.model_dump_json())
        process.stdin.close()
        process.stdin = None
        while process.poll() is None and not any(project_folder.glob("work/*/checkpoints/step-*")):
            time.sleep(0.02)
        process.send_signal(signal.SIGTERM)
        said, errors = process.communicate(timeout=200)
    assert process.returncode == 143, errors
    assert said == ""
    assert "stopped at step" in errors
    newest = max(int(each.name[5:]) for each in project_folder.glob("work/*/checkpoints/step-*"))
    caplog.set_level("INFO", "shellv_core")
    result = run_training("pretrain_projector", settings, LaunchConfig(processes_per_node=1))
    assert result.details["num_steps"] == 120
    assert f"going on from step {newest} of 120" in caplog.text


@pytest.mark.parametrize("stage", ["pretrain_projector", "finetune"])
@pytest.mark.parametrize("preset", ["nano", "smoke"])
def test_settings_pass_through_the_file_unchanged(tmp_path, stage, preset):
    from shellv_core.config import merge_values, read_yaml

    settings = stage_config(preset, stage, [f"{stage}.training.weight_decay=1e-7"], data_uri="file:///data")
    path = tmp_path / "settings.yaml"
    path.write_text(launch.settings_yaml(settings))
    assert merge_values(type(settings)(), read_yaml(path)) == settings


def test_only_training_stages_have_processes():
    with pytest.raises(ConfigError, match="'merge_lora' runs in one process"):
        run_training("merge_lora", finetune.FinetuneConfig(), TWO)


def test_missing_addresses_are_told_before_anything_starts(tmp_path):
    with pytest.raises(ConfigError, match="required and not given: output_uri=URI, data_uri=URI, model_uri=URI"):
        run_training("finetune", finetune.FinetuneConfig(), TWO)
    assert "RANK" not in os.environ


def test_the_documented_settings_are_all_that_there_are():
    section = (ROOT / "docs" / "training-distributed.md").read_text().split("| setting of the launch |")[1]
    table = section.split("\n\n")[0]
    named = {name for row in table.splitlines() for name in re.findall(r"`(\w+)`", row.split("|")[1])}
    assert named == set(LaunchConfig.model_fields)
