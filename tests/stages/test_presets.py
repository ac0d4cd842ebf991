from __future__ import annotations

import pytest

from shellv_core.config import fingerprint
from shellv_core.errors import ConfigError
from shellv_core.stages import STAGE_NAMES
from shellv_core.stages.presets import PRESETS, Preset, preset, stage_config


def test_the_presets_are_frozen_and_name_every_stage() -> None:
    assert set(PRESETS) == {"nano", "smoke", "smollm2", "shellv-7b"}
    assert tuple(Preset.model_fields) == STAGE_NAMES
    assert len({fingerprint(preset(name)) for name in PRESETS}) == len(PRESETS)


def test_the_published_recipe() -> None:
    """Figures of the README table and the scripts of Shell-V and LLaVA-1.5."""
    recipe = preset("shellv-7b")
    model = recipe.pretrain_projector.model
    assert model.vision_tower.kind == "clip"
    assert model.vision_tower.pretrained == "openai/clip-vit-large-patch14-336"
    assert (model.vision_tower.image_size, model.vision_tower.feature_layer) == (336, -2)
    assert model.vision_tower.select_strategy == "default"
    assert model.language_model.pretrained == "WisdomShell/Shell-7B"
    assert model.projector == "mlp2x_gelu"
    pretraining, finetuning = recipe.pretrain_projector.training, recipe.finetune.training
    assert (pretraining.global_batch_size, pretraining.projector_learning_rate) == (256, 1e-3)
    assert pretraining.trainable == ("projector",)
    assert finetuning.global_batch_size == 128
    assert finetuning.language_model_learning_rate == finetuning.projector_learning_rate == 2e-5
    for training in (pretraining, finetuning):
        assert training.epochs == 1.0
        assert training.max_steps is None
        assert training.max_length == 2048
        assert training.warmup_ratio == 0.03
        assert training.weight_decay == 0.0
        assert training.precision == "bf16"
    assert recipe.finetune.hacl.weight > 0


def test_overrides_reach_their_stage_and_a_bare_seed_reaches_all() -> None:
    overrides = ["finetune.hacl.weight=0", "seed=7", "evaluate.batch_size=3"]
    finetune = stage_config("nano", "finetune", overrides, data_uri="file:///d")
    assert (finetune.hacl.weight, finetune.seed, finetune.data_uri) == (0, 7, "file:///d")
    assert stage_config("nano", "evaluate", overrides).batch_size == 3
    assert all(stage_config("nano", stage, overrides).seed == 7 for stage in STAGE_NAMES)


@pytest.mark.parametrize(
    ("name", "overrides", "message"),
    [
        ("shelv-7b", [], "unknown preset 'shelv-7b'; did you mean 'shellv-7b'"),
        ("nano", ["finetun.seed=1"], "did you mean 'finetune'"),
        ("nano", ["finetune.hacl.wieght=1"], "did you mean 'weight'"),
        ("nano", ["evaluate.batch_size=0"], r"evaluate\.batch_size=0"),
    ],
)
def test_faults_are_named(name: str, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        stage_config(name, "finetune", overrides)
