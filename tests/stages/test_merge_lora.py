from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from shellv_core.errors import ModelError
from shellv_core.models.compose import load_model
from shellv_core.models.config import LoraConfig
from shellv_core.models.lora import load_adapter
from shellv_core.stages import finetune, pretrain_projector
from shellv_core.stages.merge_lora import MergeLoraConfig, run
from shellv_core.storage import InputDirectory
from shellv_core.training.config import HaclConfig
from tests.stages.training_data import MODEL, TRAINING, write_data

SHORT = TRAINING.model_copy(update={"max_steps": 4})


def pretrain(folder: Path, name: str, seed: int = 0) -> str:
    write_data((folder / "data").as_uri()) if not (folder / "data").exists() else None
    uri = (folder / name).as_uri()
    pretrain_projector.run(
        pretrain_projector.PretrainProjectorConfig(
            data_uri=(folder / "data").as_uri(), output_uri=uri, model=MODEL, training=SHORT, seed=seed
        )
    )
    return uri


@pytest.fixture
def adapter_uri(tmp_path: Path) -> str:
    uri = (tmp_path / "adapter").as_uri()
    finetune.run(
        finetune.FinetuneConfig(
            data_uri=(tmp_path / "data").as_uri(),
            model_uri=pretrain(tmp_path, "model"),
            output_uri=uri,
            training=SHORT,
            lora=LoraConfig(r=4),
            hacl=HaclConfig(weight=0),
        )
    )
    return uri


def test_merged_model_answers_as_base_with_adapter(adapter_uri, tmp_path):
    result = run(MergeLoraConfig(adapter_uri=adapter_uri, output_uri=(tmp_path / "merged").as_uri()))
    source, output = InputDirectory(adapter_uri), InputDirectory(result.output_uri)
    base, _ = load_model(InputDirectory(source.manifest.details["base_model_uri"]).fetch_tree("model/"))
    merged, _ = load_model(output.fetch_tree("model/"))
    ids = torch.tensor([[9, *[base.config.image_token_id] * 4, 11, 12]])
    pixel_values = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected = load_adapter(base, source.fetch_tree("adapter/"))(input_ids=ids, pixel_values=pixel_values).logits
        torch.testing.assert_close(merged(input_ids=ids, pixel_values=pixel_values).logits, expected)
    assert run(MergeLoraConfig(adapter_uri=adapter_uri, output_uri=result.output_uri)).reused

    twice = run(MergeLoraConfig(adapter_uri=result.output_uri, output_uri=(tmp_path / "twice").as_uri()))
    assert {entry.name: entry.sha256 for entry in InputDirectory(twice.output_uri).files()} == {
        entry.name: entry.sha256 for entry in output.files()
    }


def test_changed_base_model_is_refused(adapter_uri, tmp_path):
    shutil.rmtree(tmp_path / "model")
    pretrain(tmp_path, "model", seed=1)
    with pytest.raises(ModelError, match="is not the model that the adapter"):
        run(MergeLoraConfig(adapter_uri=adapter_uri, output_uri=(tmp_path / "merged").as_uri()))


def test_input_without_adapter_is_refused(tmp_path):
    write_data((tmp_path / "data").as_uri())
    with pytest.raises(ModelError, match="neither adapter/ nor model/"):
        run(MergeLoraConfig(adapter_uri=(tmp_path / "data").as_uri(), output_uri=(tmp_path / "merged").as_uri()))
