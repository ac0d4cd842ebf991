"""QLoRA: ten steps on a quantized model, whose adapter then belongs to the model that was never quantized."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from shellv_core.models.compose import load_model, save_model
from shellv_core.models.config import LoraConfig
from shellv_core.models.hacl import HaclHeads
from shellv_core.models.lora import add_lora, load_adapter, merge_adapter, save_adapter
from shellv_core.training.config import HaclConfig, PreferenceConfig, TrainingConfig
from shellv_core.training.examples import image_bytes, tokenize_samples
from shellv_core.training.features import CachedFeatures, pixel_batches, tower_features
from shellv_core.training.loop import set_trainable, train
from shellv_core.training.model import TrainingModel
from shellv_core.training.runtime import runtime
from tests.training.tiny import tiny_model, tiny_samples

SETTINGS = TrainingConfig(
    global_batch_size=6,
    max_steps=10,
    trainable=("projector", "language_model"),
    projector_learning_rate=1e-2,
    language_model_learning_rate=1e-2,
    max_length=256,
    log_every_steps=1,
    checkpoint_every_steps=2,
    gradient_checkpointing=True,
)
FILES = ("adapter_config.json", "adapter_model.safetensors")


class Killed(Exception):
    pass


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    path = tmp_path_factory.mktemp("base")
    model, processor = tiny_model()
    save_model(model, processor, path)
    examples = tokenize_samples(
        tiny_samples(), processor.tokenizer, processor.image_token_id, 4, 256, prompt="What is it?"
    )
    pictures = torch.cat(list(pixel_batches(image_bytes(tiny_samples()), processor)))
    return path, examples, CachedFeatures(tower_features(model, pictures)), pictures


def finetuned(prepared, lora, directory, stop=None, precision="fp32"):
    """Losses; the adapter is in `directory`. Killed after step `stop`, if one is given."""
    base, examples, features, _ = prepared
    settings = SETTINGS.model_copy(update={"precision": precision})
    compute_dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    model, _ = load_model(base, quantization=lora.quantization, compute_dtype=compute_dtype)
    torch.manual_seed(0)
    module = TrainingModel(model, HaclHeads(32), HaclConfig(weight=0.5), PreferenceConfig(weight=0.3))
    set_trainable(module, settings)
    adapted = add_lora(model, lora)
    before = {name: each.clone() for name, each in module.named_parameters()}
    losses = []

    def log(metrics, step):
        losses.append(metrics["loss"])
        if step == stop:
            raise Killed

    with runtime(model, settings):
        train(module, examples, features, settings, 0, directory / "checkpoint", log)
    for name, each in module.named_parameters():
        assert torch.equal(each, before[name]) != each.requires_grad, name
    save_adapter(adapted, directory / "adapter", "s3://models/base")
    return losses


@pytest.mark.parametrize(
    ("lora", "precision"),
    [
        (LoraConfig(r=4, alpha=8, quantization="nf4"), "fp32"),
        (LoraConfig(r=4, alpha=8, quantization="nf4"), "bf16"),
        (LoraConfig(r=4, alpha=8, quantization="int8"), "fp32"),
        (LoraConfig(r=4, alpha=8, quantization="int8"), "bf16"),
        (LoraConfig(r=4, alpha=8, quantization="nf4", dora=True), "fp32"),
    ],
    ids=["nf4", "nf4-bf16", "int8", "int8-bf16", "nf4-dora"],
)
def test_ten_steps_whose_adapter_belongs_to_the_unquantized_model(prepared, tmp_path, lora, precision):
    base, _, _, pictures = prepared
    losses = finetuned(prepared, lora, tmp_path, precision=precision)
    assert len(losses) == 10
    assert losses[-1] < losses[0] - 1.5
    plain, processor = load_model(base)
    ids = torch.tensor([[9, *[processor.image_token_id] * 4, 11, 12, 13]])
    inputs = {"input_ids": ids, "pixel_values": pictures[:1]}
    options = {"max_new_tokens": 6, "do_sample": False}
    with torch.no_grad():
        before = plain(**inputs).logits
        adapted = load_adapter(plain, tmp_path / "adapter")
        logits, answer = adapted(**inputs).logits, adapted.generate(**inputs, **options)
    assert not torch.allclose(logits, before, atol=0.1)
    merge_adapter(base, tmp_path / "adapter", tmp_path / "merged")
    merged, _ = load_model(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(merged(**inputs).logits, logits, atol=1e-5, rtol=1e-5)
        assert torch.equal(merged.generate(**inputs, **options), answer)
    assert answer.shape[1] > ids.shape[1]
    first, second = (load_file(path / "model.safetensors") for path in (base, tmp_path / "merged"))
    assert {name: each.dtype for name, each in first.items()} == {name: each.dtype for name, each in second.items()}


@pytest.mark.parametrize(
    "lora",
    [LoraConfig(r=2, dropout=0.2, quantization="nf4", dora=True), LoraConfig(r=2, dropout=0.2, quantization="int8")],
    ids=["nf4-dora", "int8"],
)
def test_a_run_that_was_killed_writes_the_same_bytes(prepared, tmp_path, lora):
    finetuned(prepared, lora, tmp_path / "whole")
    with pytest.raises(Killed):
        finetuned(prepared, lora, tmp_path / "cut", stop=5)
    finetuned(prepared, lora, tmp_path / "cut")
    for name in FILES:
        whole, cut = ((tmp_path / run / "adapter" / name).read_bytes() for run in ("whole", "cut"))
        assert whole == cut
