from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM

from shellv_core.cli import main
from shellv_core.config import apply_overrides
from shellv_core.models.compose import build_model
from shellv_core.stages.presets import preset

gguf = pytest.importorskip("gguf")

WORDS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *"abcdefgh", "Ġ", "Ġa"]
HEADS, KEY_HEADS, HIDDEN = 4, 2, 32


def tiny_llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(WORDS), hidden_size=HIDDEN, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=HEADS, num_key_value_heads=KEY_HEADS, max_position_embeddings=64,
        tie_word_embeddings=True, bos_token_id=1, eos_token_id=2, pad_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def write_gguf(model: LlamaForCausalLM, path: Path, left_out: str = "lm_head.weight") -> None:
    """As llama.cpp writes a LLaMA: queries and keys interleave the halves of each head."""
    config = model.config
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(config.hidden_size // config.num_attention_heads)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(WORDS)
    writer.add_token_types([3, 3, 3] + [1] * (len(WORDS) - 3))
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_pad_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in model.state_dict().items():
        if name in ("lm_head.weight", left_out):
            continue
        values = tensor.numpy()
        for part, heads in (("q_proj", HEADS), ("k_proj", KEY_HEADS)):
            if part in name:
                values = values.reshape(heads, 2, -1, HIDDEN).swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(names.get_name(name, (".weight",)), np.ascontiguousarray(values))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_becomes_the_same_model_and_tokenizer(tmp_path, capsys):
    model = tiny_llama()
    write_gguf(model, tmp_path / "tiny.gguf")
    assert main(["model", "convert", str(tmp_path / "tiny.gguf"), str(tmp_path / "out")]) == 0
    assert "is a GGUF file; wrote" in capsys.readouterr().out
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())
    converted = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    ids = torch.tensor([[1, 3, 5, 4, 10]])
    torch.testing.assert_close(converted(ids).logits, model(ids).logits)
    assert converted.config.tie_word_embeddings
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.eos_token == "<|im_end|>"
    assert tokenizer("abc", add_special_tokens=False)["input_ids"] == [3, 4, 5]


def test_the_preset_takes_the_directory(tmp_path):
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    assert main(["model", "convert", str(tmp_path / "tiny.gguf"), str(tmp_path / "out")]) == 0
    overrides = [f"{part}.pretrained={tmp_path / 'out'}" for part in ("language_model", "tokenizer")]
    recipe = preset("smollm2").pretrain_projector.model
    model, processor = build_model(apply_overrides(recipe, [*overrides, "vision_tower.pretrained=null"]))
    assert model.config.text_config.model_type == "llama"
    # One row more, for the image token; the template's markers are the model's own.
    assert model.lm_head.out_features == len(processor.tokenizer) == len(WORDS) + 1
    assert model.generation_config.eos_token_id == WORDS.index("<|im_end|>")


def test_a_broken_file_leaves_nothing(tmp_path, capsys):
    (tmp_path / "broken.gguf").write_bytes(b"GGUF\x03\x00\x00\x00 and no more")
    assert main(["model", "convert", str(tmp_path / "broken.gguf"), str(tmp_path / "out")]) == 1
    assert "cannot read the GGUF file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_missing_tensors_are_named_and_not_made_up(tmp_path, capsys):
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf", left_out="model.norm.weight")
    assert main(["model", "convert", str(tmp_path / "tiny.gguf"), str(tmp_path / "out")]) == 1
    assert "model.norm.weight" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_options_that_mean_nothing_are_refused(tmp_path, capsys):
    write_gguf(tiny_llama(), tmp_path / "tiny.gguf")
    arguments = ["model", "convert", str(tmp_path / "tiny.gguf"), str(tmp_path / "out"), "--template", "v1"]
    assert main(arguments) == 1
    assert "--template" in capsys.readouterr().err
