from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shellv_core.config import apply_overrides
from shellv_core.errors import ConfigError, ModelError
from shellv_core.models.compose import load_model
from shellv_core.stages.pretrain_projector import PretrainProjectorConfig, run
from shellv_core.storage import InputDirectory
from shellv_core.tracking.runs import EXPERIMENT, open_client
from shellv_core.training.config import TrainingConfig
from tests.stages.training_data import MODEL, TRAINING, write_data


def config(tmp_path: Path, **values):
    data_uri = (tmp_path / "data").as_uri()
    if not (tmp_path / "data").exists():
        write_data(data_uri)
    output_uri = (tmp_path / "out-{fingerprint}").as_uri().replace("%7B", "{").replace("%7D", "}")
    return PretrainProjectorConfig(
        **{"data_uri": data_uri, "output_uri": output_uri, "model": MODEL, "training": TRAINING, **values}
    )


def test_makes_a_model_that_has_learned(tmp_path):
    result = run(config(tmp_path))
    assert result.details["num_steps"] == 30
    assert result.metrics["generation_loss"] < 4
    output = InputDirectory(result.output_uri)
    assert {entry.name for entry in output.files()} == {
        f"model/{name}"
        for name in (
            "chat_template.jinja",
            "config.json",
            "efficientnet_lite.py",
            "generation_config.json",
            "model.safetensors",
            "processor_config.json",
            "tokenizer.json",
            "tokenizer_config.json",
        )
    }
    model, _ = load_model(output.fetch_tree("model/"))
    assert model.model.vision_tower.feature_std.std() > 0, "the vision tower is standardized"
    again = run(config(tmp_path))
    assert again.reused
    assert again.metrics == result.metrics
    client = open_client()
    (tracked,) = client.search_runs([client.get_experiment_by_name(EXPERIMENT).experiment_id])
    report = Path(client.download_artifacts(tracked.info.run_id, "report.html")).read_text()
    assert "30 optimizer steps" in report
    assert "vision tower" in report


def test_same_settings_same_weights(tmp_path):
    first = run(config(tmp_path, output_uri=(tmp_path / "first").as_uri()))
    second = run(config(tmp_path, output_uri=(tmp_path / "second").as_uri()))
    assert not second.reused
    first_files, second_files = (
        {entry.name: entry.sha256 for entry in InputDirectory(result.output_uri).files()} for result in (first, second)
    )
    assert first_files == second_files


def test_frozen_language_model_stays_random(tmp_path):
    only_projector = TRAINING.model_copy(update={"trainable": ("projector",)})
    both, projector = (
        load_file(InputDirectory(run(settings).output_uri).fetch_tree("model/") / "model.safetensors")
        for settings in (config(tmp_path), config(tmp_path, training=only_projector))
    )
    changed = {name for name in both if not torch.equal(both[name], projector[name])}
    assert any("language_model" in name for name in changed)
    assert any("projector" in name for name in changed)
    assert not any("vision_tower" in name for name in changed)


def test_empty_split_is_an_error_and_leaves_nothing(tmp_path):
    settings = config(tmp_path, output_uri=(tmp_path / "out").as_uri(), data_uri=(tmp_path / "other").as_uri())
    write_data(settings.data_uri, samples=[])
    with pytest.raises(ModelError, match="no training picture"):
        run(settings)
    assert not (tmp_path / "out" / "manifest.json").exists()


def test_overrides_reach_every_part(tmp_path):
    overrides = [
        "model.language_model.options.num_hidden_layers=1",
        "model.vision_tower.standardize=false",
        "training.trainable=[projector]",
        "training.projector_learning_rate=2e-3",
    ]
    changed = apply_overrides(config(tmp_path), overrides)
    assert changed.model.language_model.options["num_hidden_layers"] == 1
    assert changed.training.projector_learning_rate == 2e-3
    with pytest.raises(ConfigError, match="did you mean 'warmup_ratio'"):
        apply_overrides(changed, ["training.warmup_rato=0.1"])
    with pytest.raises(ConfigError, match="not a multiple of micro_batch_size=5"):
        apply_overrides(changed, ["training.micro_batch_size=5"])


def test_published_recipe_can_be_said():
    settings = PretrainProjectorConfig(
        training=TrainingConfig(
            global_batch_size=256,
            micro_batch_size=32,
            projector_learning_rate=1e-3,
            precision="bf16",
            cache_features=False,
        ),
    )
    assert settings.training.warmup_ratio == 0.03
    assert settings.training.max_length == 2048
    assert settings.training.epochs == 1
    assert settings.training.trainable == ("projector",)
