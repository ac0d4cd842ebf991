from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from shellv_core.config import apply_overrides
from shellv_core.errors import ConfigError, ModelError, ObjectNotFoundError
from shellv_core.models.config import LoraConfig
from shellv_core.models.hacl import load_heads
from shellv_core.stages import finetune, merge_lora, pretrain_projector
from shellv_core.storage import InputDirectory
from shellv_core.training.config import HaclConfig, PreferenceConfig, TrainingConfig
from tests.data.shard_folder import shard_folder
from tests.stages.training_data import MODEL, TRAINING, write_data
from tests.training.tiny import tiny_samples


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Data and a pretrained model, made once for this module."""
    folder = tmp_path_factory.mktemp("finetune")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHELLV_HOME", str(folder / "home"))
        write_data((folder / "data").as_uri())
        pretrain_projector.run(
            pretrain_projector.PretrainProjectorConfig(
                data_uri=(folder / "data").as_uri(),
                output_uri=(folder / "model").as_uri(),
                model=MODEL,
                training=TRAINING.model_copy(update={"max_steps": 5}),
            )
        )
    return folder


def config(folder: Path, output: Path, **values):
    return finetune.FinetuneConfig(
        output_uri=output.as_uri(),
        **{
            "data_uri": (folder / "data").as_uri(),
            "model_uri": (folder / "model").as_uri(),
            "training": TRAINING,
            "lora": LoraConfig(r=4, alpha=8),
            **values,
        },
    )


def names(uri: str) -> set[str]:
    return {entry.name for entry in InputDirectory(uri).files()}


ADAPTER = {"adapter/adapter_config.json", "adapter/adapter_model.safetensors"}


def test_with_hacl_then_merged(folder, tmp_path):
    result = finetune.run(config(folder, tmp_path / "out", hacl=HaclConfig(weight=0.5, num_hallucinated=2)))
    assert names(result.output_uri) == ADAPTER | {"hacl/heads.safetensors"}
    assert result.details == {
        "num_steps": 30,
        "base_model_uri": (folder / "model").as_uri(),
        "engine": "ddp",
        "num_processes": 1,
    }
    assert {"image_to_text_loss", "hallucination_margin", "samples_per_second"} <= set(result.metrics)
    output = InputDirectory(result.output_uri)
    heads = load_heads(output.fetch("hacl/heads.safetensors"))
    assert heads.hidden_size == 32

    merged = merge_lora.run(
        merge_lora.MergeLoraConfig(adapter_uri=result.output_uri, output_uri=(tmp_path / "merged").as_uri())
    )
    assert names(merged.output_uri) == names((folder / "model").as_uri())
    before, after = (
        load_file(InputDirectory(uri).fetch_tree("model/") / "model.safetensors")
        for uri in ((folder / "model").as_uri(), merged.output_uri)
    )
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed
    assert all("projector" in name or "language_model" in name for name in changed)
    assert not any("embed_tokens" in name or "lm_head" in name for name in changed)


def test_quantized_base_whose_adapter_is_merged_into_the_unquantized(folder, tmp_path):
    lora, training = LoraConfig(r=4, quantization="nf4"), TRAINING.model_copy(update={"max_steps": 3})
    result = finetune.run(config(folder, tmp_path / "out", lora=lora, training=training))
    assert names(result.output_uri) == ADAPTER | {"hacl/heads.safetensors"}
    merged = merge_lora.run(
        merge_lora.MergeLoraConfig(adapter_uri=result.output_uri, output_uri=(tmp_path / "merged").as_uri())
    )
    assert names(merged.output_uri) == names((folder / "model").as_uri())
    before, after = (
        load_file(InputDirectory(uri).fetch_tree("model/") / "model.safetensors")
        for uri in ((folder / "model").as_uri(), merged.output_uri)
    )
    assert {name: each.dtype for name, each in after.items()} == {name: each.dtype for name, each in before.items()}


def test_baseline_has_no_heads(folder, tmp_path):
    result = finetune.run(config(folder, tmp_path / "out", hacl=HaclConfig(weight=0)))
    assert names(result.output_uri) == ADAPTER
    assert "image_to_text_loss" not in result.metrics


def test_objective_changes_the_adapter_and_a_rerun_does_not(folder, tmp_path):
    weights = []
    for output, weight in (("first", 0.5), ("again", 0.5), ("plain", 0.0)):
        result = finetune.run(config(folder, tmp_path / output, hacl=HaclConfig(weight=weight)))
        weights.append(load_file(InputDirectory(result.output_uri).fetch("adapter/adapter_model.safetensors")))
    first, again, plain = weights
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert any(not torch.equal(first[name], plain[name]) for name in first)


def test_without_lora_the_whole_model_is_trained_and_merging_keeps_it(folder, tmp_path):
    result = finetune.run(config(folder, tmp_path / "out", lora=None, hacl=HaclConfig(weight=0)))
    assert names(result.output_uri) == names((folder / "model").as_uri())
    merged = merge_lora.run(
        merge_lora.MergeLoraConfig(adapter_uri=result.output_uri, output_uri=(tmp_path / "merged").as_uri())
    )
    first, second = (
        {entry.name: entry.sha256 for entry in InputDirectory(uri).files()}
        for uri in (result.output_uri, merged.output_uri)
    )
    assert first == second


@pytest.mark.parametrize("lora", [LoraConfig(r=4, alpha=8), None])
def test_preference(folder, tmp_path, lora):
    """With adapters the reference is the model without them, otherwise a copy; neither reaches the output."""
    result = finetune.run(
        config(folder, tmp_path / "out", lora=lora, hacl=HaclConfig(), preference=PreferenceConfig(weight=0.5))
    )
    assert {"preference_loss", "reward_margin", "preference_accuracy"} <= set(result.metrics)
    assert result.metrics["reward_margin"] > 0
    assert names(result.output_uri) == (names((folder / "model").as_uri()) if lora is None else ADAPTER)


def test_heads_of_pretraining_are_trained_on(folder, tmp_path):
    short = TRAINING.model_copy(update={"max_steps": 3})
    hacl = HaclConfig(weight=0.5, negatives="paired", heads="none", queue_size=8)
    pretrained = pretrain_projector.run(
        pretrain_projector.PretrainProjectorConfig(
            data_uri=(folder / "data").as_uri(),
            output_uri=(tmp_path / "model").as_uri(),
            model=MODEL,
            hacl=hacl,
            training=short.model_copy(update={"trainable": ("projector",)}),
        )
    )
    assert {"image_to_text_loss", "queue_fill", "temperature"} <= set(pretrained.metrics)
    assert names(pretrained.output_uri) == names((folder / "model").as_uri()) | {"hacl/heads.safetensors"}
    output = InputDirectory(pretrained.output_uri)
    before = load_heads(output.fetch("hacl/heads.safetensors"))
    assert before.kind == "none"
    assert before.temperature != 0.07
    still = hacl.model_copy(update={"learning_rate": 1e-12})
    result = finetune.run(config(folder, tmp_path / "out", model_uri=pretrained.output_uri, hacl=still, training=short))
    after = load_heads(InputDirectory(result.output_uri).fetch("hacl/heads.safetensors"))
    assert after.temperature == before.temperature
    other = hacl.model_copy(update={"heads": "linear"})
    with pytest.raises(ModelError, match="kind 'none' for hidden size 32, this stage wants kind 'linear'"):
        finetune.run(config(folder, tmp_path / "other", model_uri=pretrained.output_uri, hacl=other, training=short))


def test_settings_that_contradict_are_refused(folder, tmp_path):
    settings = config(folder, tmp_path)
    with pytest.raises(ConfigError, match="lora adapts the language model"):
        apply_overrides(settings, ["training.trainable=[projector]"])
    assert apply_overrides(settings, ["lora=null", "training.trainable=[projector]"]).lora is None


def test_missing_base_model_is_named(folder, tmp_path):
    with pytest.raises(ObjectNotFoundError, match="nowhere"):
        finetune.run(config(folder, tmp_path / "out").model_copy(update={"model_uri": (tmp_path / "nowhere").as_uri()}))


def test_published_recipe_can_be_said():
    settings = finetune.FinetuneConfig(
        lora=LoraConfig(r=128, alpha=256),
        training=TrainingConfig(
            global_batch_size=128,
            trainable=("projector", "language_model"),
            projector_learning_rate=2e-5,
            language_model_learning_rate=2e-5,
            precision="bf16",
            cache_features=False,
        ),
    )
    assert apply_overrides(settings, ["lora=null"]).lora is None


@pytest.fixture(scope="module")
def half(folder: Path) -> Path:
    """A model stored in bfloat16, its projector trained, its language model not."""
    output = folder / "half"
    pretrain_projector.run(
        pretrain_projector.PretrainProjectorConfig(
            data_uri=(folder / "data").as_uri(),
            output_uri=output.as_uri(),
            model=MODEL.model_copy(update={"dtype": "bfloat16"}),
            training=HALF.model_copy(update={"trainable": ("projector",)}),
            hacl=HaclConfig(weight=0.5),
        )
    )
    return output


HALF = TRAINING.model_copy(update={"precision": "bf16", "max_steps": 10})


def float_dtypes(path: Path) -> set[torch.dtype]:
    return {tensor.dtype for tensor in load_file(path).values() if tensor.is_floating_point()}


@pytest.mark.parametrize("packing", [False, True])
def test_what_is_frozen_stays_in_bfloat16_and_what_learns_is_float32(folder, half, tmp_path, caplog, packing):
    assert float_dtypes(half / "model" / "model.safetensors") == {torch.bfloat16}
    training = HALF.model_copy(update={"packing": packing, "pack_tokens": 512})
    data = folder / "data"
    if packing:
        data = tmp_path / "shards"
        shard_folder(data.as_uri(), tmp_path / "work", {"train": tiny_samples()}, samples_per_shard=8)
    with caplog.at_level("INFO"):
        result = finetune.run(
            config(
                folder,
                tmp_path / "out",
                data_uri=data.as_uri(),
                model_uri=half.as_uri(),
                training=training,
                hacl=HaclConfig(weight=0.5, queue_size=16),
            )
        )
    parts = {line.split("  ")[0]: line for line in caplog.text.splitlines()}
    assert "bfloat16" in parts["language model"]
    assert "float32" in parts["adapters"]
    assert "float32" in parts["projector"]
    assert float_dtypes(tmp_path / "out" / "adapter" / "adapter_model.safetensors") == {torch.float32}
    merged = merge_lora.run(
        merge_lora.MergeLoraConfig(adapter_uri=result.output_uri, output_uri=(tmp_path / "merged").as_uri())
    )
    assert float_dtypes(tmp_path / "merged" / "model" / "model.safetensors") == {torch.bfloat16}
    assert merged.details["base_model_uri"] == half.as_uri()


def test_all_weights_are_trained_in_float32_and_stored_as_before(folder, half, tmp_path):
    result = finetune.run(config(folder, tmp_path / "out", model_uri=half.as_uri(), training=HALF, lora=None))
    assert float_dtypes(InputDirectory(result.output_uri).fetch("model/model.safetensors")) == {torch.bfloat16}
