"""Stages as torchrun starts them on a cluster: one output, one result on standard output, one message of a fault."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from shellv_core.models.compose import load_model
from shellv_core.models.config import LoraConfig
from shellv_core.stages import merge_lora, pretrain_projector
from shellv_core.storage import InputDirectory
from tests.stages.training_data import MODEL, TRAINING, write_data

ROOT = Path(__file__).resolve().parents[2]
#: What the second process of a run does when it gets to training.
FAULT = """
import os
from shellv_core import cli
from shellv_core.errors import DataError
from shellv_core.training import fit

if os.environ["RANK"] == "1":
    def train(*arguments, **options):
        raise DataError("the second process cannot read its data.")
    fit.train = train
raise SystemExit(cli.main())
"""


def torchrun(home: Path, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """Run a program in two processes of this machine."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "MLFLOW_"))}
    return subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *arguments],
        cwd=ROOT,
        env={**kept, "SHELLV_HOME": str(home), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("processes")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHELLV_HOME", str(folder / "home"))
        write_data((folder / "data").as_uri())
        pretrain_projector.run(
            pretrain_projector.PretrainProjectorConfig(
                data_uri=(folder / "data").as_uri(),
                output_uri=(folder / "model").as_uri(),
                model=MODEL,
                training=TRAINING.model_copy(update={"max_steps": 2}),
            )
        )
    return folder


def finetune(folder: Path, output: str, *settings: str) -> list[str]:
    lora = LoraConfig(r=4, alpha=8)
    return [
        "finetune",
        "--preset=smoke",
        f"data_uri={(folder / 'data').as_uri()}",
        f"model_uri={(folder / 'model').as_uri()}",
        f"output_uri={(folder / output).as_uri()}",
        f"lora.r={lora.r}",
        "training.max_steps=4",
        "training.tasks=null",
        *settings,
    ]


def test_finetune_with_zero_3_then_merged(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ("training.engine=deepspeed", "training.zero_stage=3")
    done = torchrun(folder / "home", "-m", "shellv_core.cli", *finetune(folder, "tuned", *settings))
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert {key: result["details"][key] for key in ("engine", "zero_stage", "num_processes")} == {
        "engine": "deepspeed",
        "zero_stage": 3,
        "num_processes": 2,
    }
    assert result["metrics"]["loss"] > 0
    names = {entry.name for entry in InputDirectory(result["output_uri"]).files()}
    assert {"adapter/adapter_model.safetensors", "hacl/heads.safetensors"} <= names
    monkeypatch.setenv("SHELLV_HOME", str(folder / "home"))
    merged = merge_lora.run(
        merge_lora.MergeLoraConfig(adapter_uri=result["output_uri"], output_uri=(folder / "merged").as_uri())
    )
    model, processor = load_model(InputDirectory(merged.output_uri).fetch_tree("model/"))
    before, _ = load_model(InputDirectory((folder / "model").as_uri()).fetch_tree("model/"))
    changed = [name for name, value in model.state_dict().items() if not torch.equal(value, before.state_dict()[name])]
    assert any("self_attn" in name for name in changed)
    assert any("multi_modal_projector" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)
    ids = processor.tokenizer("It is", return_tensors="pt")["input_ids"]
    assert model.generate(input_ids=ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]


def test_one_process_that_fails_ends_all_with_one_message(folder: Path, tmp_path: Path) -> None:
    program = tmp_path / "faulty.py"
    program.write_text(FAULT)
    done = torchrun(folder / "home", str(program), *finetune(folder, "failed"))
    assert done.returncode != 0
    assert done.stdout == ""
    messages = [line for line in done.stderr.splitlines() if line.startswith("shellv: ")]
    assert messages == ["shellv: the second process cannot read its data."]


def test_a_fault_of_all_is_told_once(folder: Path) -> None:
    done = torchrun(folder / "home", "-m", "shellv_core.cli", *finetune(folder, "wrong", "training.zero_stage=2"))
    assert done.returncode != 0
    (message,) = [line for line in done.stderr.splitlines() if line.startswith("shellv: ")]
    assert "zero_stage=2 has no effect with engine=ddp" in message


def test_other_stages_refuse_more_than_one_process(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from shellv_core.errors import ConfigError

    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match="merge_lora runs in one process; torchrun started 2"):
        merge_lora.run(merge_lora.MergeLoraConfig(adapter_uri=(folder / "tuned").as_uri(), output_uri="file:///x"))
    monkeypatch.setenv("RANK", "2")
    with pytest.raises(ConfigError, match="do not fit together: RANK='2', WORLD_SIZE='2', LOCAL_RANK='0'"):
        merge_lora.run(merge_lora.MergeLoraConfig())
