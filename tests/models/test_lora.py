import pytest
import torch
from safetensors.torch import load_file, save_file

from shellv_core.errors import ModelError
from shellv_core.models.compose import load_model, save_model
from shellv_core.models.config import LoraConfig
from shellv_core.models.hacl import HaclHeads, load_heads, save_heads, within_range
from shellv_core.models.lora import add_lora, load_adapter, merge_adapter, save_adapter
from tests.training.tiny import CLIP, EFFICIENTNET, LANGUAGE_MODEL, tiny_model

TIED = LANGUAGE_MODEL.model_copy(update={"tie_word_embeddings": True})
LLAMA = LANGUAGE_MODEL.model_copy(update={"model_type": "llama"})


def batch(model):
    size = model.config.vision_config.image_size
    generator = torch.Generator().manual_seed(1)
    ids = torch.tensor([[9, *[model.config.image_token_id] * 4, 11, 12, 13]])
    return {"input_ids": ids, "pixel_values": torch.randn(1, 3, size, size, generator=generator)}


def trained_adapter(tmp_path, vision_tower=EFFICIENTNET, language_model=LANGUAGE_MODEL, dora=False):
    """A base model directory, an adapter directory with random weights, and the adapter's logits."""
    model, processor = tiny_model(vision_tower, language_model)
    save_model(model, processor, tmp_path / "base")
    base_logits = model(**batch(model)).logits
    adapted = add_lora(model, LoraConfig(r=4, alpha=8, dora=dora))
    assert torch.equal(adapted(**batch(model)).logits, base_logits)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        logits = adapted(**batch(model)).logits
    assert not torch.allclose(logits, base_logits, atol=1e-2)
    save_adapter(adapted, tmp_path / "adapter", "s3://models/base")
    return logits


@pytest.mark.parametrize(
    ("vision_tower", "language_model", "dora"),
    [(EFFICIENTNET, LANGUAGE_MODEL, False), (CLIP, LLAMA, False), (EFFICIENTNET, TIED, False), (CLIP, LLAMA, True)],
    ids=["efficientnet-starcoder2", "clip-llama", "tied", "dora"],
)
def test_merged_logits_equal_the_adapters(tmp_path, vision_tower, language_model, dora):
    logits = trained_adapter(tmp_path, vision_tower, language_model, dora)
    weights = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert any("lora_magnitude_vector" in name for name in weights) == dora
    assert {path.name for path in (tmp_path / "adapter").iterdir()} == {
        "adapter_config.json",
        "adapter_model.safetensors",
    }
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert {path.name for path in (tmp_path / "merged").iterdir()} == {
        path.name for path in (tmp_path / "base").iterdir()
    }
    merged, _ = load_model(tmp_path / "merged")
    assert set(load_file(tmp_path / "merged" / "model.safetensors")) == set(
        load_file(tmp_path / "base" / "model.safetensors")
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(**batch(merged)).logits, logits, atol=1e-5, rtol=1e-5)


def test_merging_twice_changes_nothing(tmp_path):
    trained_adapter(tmp_path)
    merge_adapter(tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    merge_adapter(tmp_path / "base", tmp_path / "merged", tmp_path / "again")
    for path in (tmp_path / "merged").iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_saved_adapter_comes_back_equal(tmp_path):
    logits = trained_adapter(tmp_path)
    base, _ = load_model(tmp_path / "base")
    with torch.no_grad():
        assert torch.equal(load_adapter(base, tmp_path / "adapter")(**batch(base)).logits, logits)


def test_only_language_model_and_projector_train():
    for train_projector in (True, False):
        model, _ = tiny_model()
        add_lora(model, LoraConfig(r=2), train_projector)
        trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
        assert any("lora_A" in name and "language_model" in name for name in trained)
        assert any("multi_modal_projector" in name for name in trained) == train_projector
        assert not any("vision_tower" in name or "lm_head" in name or "embed_tokens" in name for name in trained)
        linears = {name.rpartition(".lora_A")[0] for name in trained if "lora_A" in name}
        assert len(linears) == 2 * 6


@pytest.mark.parametrize("damage", ["missing", "unexpected", "shape"])
def test_adapter_with_other_weights_is_refused(tmp_path, damage):
    trained_adapter(tmp_path)
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    weights = load_file(path)
    name = next(key for key in weights if "lora_A" in key)
    if damage == "missing":
        del weights[name]
    elif damage == "unexpected":
        weights[name.replace("layers.0", "layers.7")] = weights[name].clone()
    else:
        weights[name] = torch.zeros(1, 1)
    save_file(weights, path)
    base, _ = load_model(tmp_path / "base")
    with pytest.raises(ModelError, match="does not fit its base model"):
        load_adapter(base, tmp_path / "adapter")


def test_no_adapter_there(tmp_path):
    with pytest.raises(ModelError, match="holds no adapter"):
        load_adapter(tiny_model()[0], tmp_path)


def test_heads_come_back_equal(tmp_path):
    heads = HaclHeads(32)
    with torch.no_grad():
        heads.temperature.fill_(0.9)
        heads.temperature.copy_(within_range(heads.temperature))
    assert float(heads.temperature.detach()) == 0.5
    save_heads(heads, tmp_path / "heads.safetensors")
    loaded = load_heads(tmp_path / "heads.safetensors")
    states = torch.randn(3, 32)
    assert torch.equal(loaded.embed_images(states), heads.embed_images(states))
    assert loaded.embed_texts(states).shape == (3, 8)
    torch.testing.assert_close(loaded.embed_texts(states).norm(dim=-1), torch.ones(3))
    with pytest.raises(ModelError, match="no HACL heads"):
        load_heads(tmp_path / "nothing.safetensors")
