"""CodeShell becomes Starcoder2: the same function, every bit, in little memory."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from shellv_core.errors import ModelError, OutputNotEmptyError
from shellv_core.models.exporting import export
from shellv_core.models.importing import convert
from shellv_core.models.weights import read_weights
from tests.data.tiny_tokenizers import REAL
from tests.models.checkpoints_tiny import (
    HEADS,
    HIDDEN,
    LAYERS,
    POSITIONS,
    codeshell_config,
    codeshell_logits,
    codeshell_tensors,
    logits_of,
    write_checkpoint,
)

SCALINGS = {"plain": None, "linear": {"type": "linear", "factor": 4.0}, "dynamic": {"type": "dynamic", "factor": 2.0}}
CONTAINERS = ("safetensors", "bin", "old bin", "safetensors shards", "bin shards")


def read_all(directory):
    return {name: tensor.read() for name, tensor in read_weights(directory).items()}


def same(left, right):
    return set(left) == set(right) and all(
        torch.equal(left[name], right[name]) and left[name].dtype == right[name].dtype for name in left
    )


def without_buffers(tensors):
    return {name: tensor for name, tensor in tensors.items() if "rotary_emb" not in name}


@pytest.mark.parametrize("scaling", SCALINGS)
@pytest.mark.parametrize(
    "sizes",
    [
        {},
        {"n_embd": 96, "n_head": 4, "num_query_groups": 1, "n_inner": None},
        {"n_embd": 256, "n_head": 8, "num_query_groups": 8, "n_inner": 320, "layer_norm_epsilon": 1e-3},
    ],
    ids=["grouped", "one group", "all heads"],
)
def test_the_same_logits_as_codeshells_definition(tmp_path, scaling, sizes):
    config = codeshell_config(rope_scaling=SCALINGS[scaling], **sizes)
    tensors = codeshell_tensors(config)
    write_checkpoint(tmp_path / "in", config, tensors)
    convert(tmp_path / "in", tmp_path / "out")
    model, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert type(model).__name__ == "Starcoder2ForCausalLM"
    assert not any(loading.values())
    generator = torch.Generator().manual_seed(7)
    # Within the original length, just at it, beyond it, and within again.
    lengths = (9, POSITIONS, 2 * POSITIONS + 5, 9)
    texts = [torch.randint(3, 420, (2, length), generator=generator) for length in lengths]
    for input_ids in texts:
        expected = codeshell_logits(config, tensors, input_ids)
        assert expected.std() > 0.3
        torch.testing.assert_close(logits_of(model, input_ids), expected, atol=1e-5, rtol=1e-5)


def test_scaling_matters_to_the_oracle():
    config = codeshell_config()
    tensors = codeshell_tensors(config)
    input_ids = torch.randint(3, 420, (1, 3 * POSITIONS), generator=torch.Generator().manual_seed(1))
    results = [codeshell_logits({**config, "rope_scaling": each}, tensors, input_ids) for each in SCALINGS.values()]
    for left, right in ((0, 1), (0, 2), (1, 2)):
        assert (results[left] - results[right]).abs().max() > 1e-2


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_there_and_back_is_bit_identical(tmp_path, container, dtype):
    config = codeshell_config(rope_scaling={"type": "dynamic", "factor": 2.0})
    tensors = codeshell_tensors(config, dtype=dtype)
    write_checkpoint(tmp_path / "in", config, tensors, container)
    said = convert(tmp_path / "in", tmp_path / "out")
    assert "is a CodeShell language model" in said
    export(tmp_path / "out", tmp_path / "back", "codeshell")
    assert same(read_all(tmp_path / "back"), without_buffers(tensors))
    back = json.loads((tmp_path / "back" / "config.json").read_text())
    kept = set(config) - {"architectures", "model_type", "auto_map", "torch_dtype", "transformers_version"}
    assert {name: back[name] for name in kept} == {name: config[name] for name in kept}
    assert back["torch_dtype"] == str(dtype).removeprefix("torch.")
    convert(tmp_path / "back", tmp_path / "again")
    assert same(read_all(tmp_path / "again"), read_all(tmp_path / "out"))
    assert not list(tmp_path.glob(".*"))


def test_tied_embeddings_and_the_second_name_of_the_embeddings(tmp_path):
    config = codeshell_config()
    tensors = codeshell_tensors(config)
    del tensors["lm_head.weight"]
    tensors["transformer.embed_tokens.weight"] = tensors["transformer.wte.weight"].clone()
    write_checkpoint(tmp_path / "in", config, tensors)
    convert(tmp_path / "in", tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.config.tie_word_embeddings
    input_ids = torch.arange(3, 20)[None]
    expected = codeshell_logits(config, tensors, input_ids)
    torch.testing.assert_close(logits_of(model, input_ids), expected, atol=1e-4, rtol=1e-5)
    export(tmp_path / "out", tmp_path / "back", "codeshell")
    assert "lm_head.weight" not in read_weights(tmp_path / "back")
    tensors["transformer.embed_tokens.weight"][3, 3] += 1
    write_checkpoint(tmp_path / "torn", config, tensors)
    with pytest.raises(ModelError, match=r"embed_tokens\.weight and transformer\.wte\.weight .* differ"):
        convert(tmp_path / "torn", tmp_path / "no")
    write_checkpoint(tmp_path / "untied", {**config, "tie_word_embeddings": False}, tensors)
    del tensors["transformer.embed_tokens.weight"]
    write_checkpoint(tmp_path / "untied", {**config, "tie_word_embeddings": False}, tensors)
    with pytest.raises(ModelError, match=r"1 missing: lm_head\.weight"):
        convert(tmp_path / "untied", tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="no tokenizer of CodeShell beside the project")
def test_the_real_tokenizer_vocabulary_and_end_of_text(tmp_path):
    import shutil

    from shellv_core.templates import TEMPLATES, template_of

    config = codeshell_config(vocab_size=70144, bos_token_id=70000, eos_token_id=70000, n_embd=32, n_head=4)
    write_checkpoint(tmp_path / "in", config, codeshell_tensors(config), tokenizer=False)
    shutil.copytree(REAL, tmp_path / "in", dirs_exist_ok=True)
    (tmp_path / "in" / "generation_config.json").write_text(
        json.dumps({"_from_model_config": True, "bos_token_id": 70000, "eos_token_id": 70000, "top_p": 0.9})
    )
    for name in (None, "shellv"):
        out = tmp_path / f"out {name}"
        convert(tmp_path / "in", out, template=name)
        model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
        generation = GenerationConfig.from_pretrained(out)
        assert (generation.bos_token_id, generation.eos_token_id, generation.pad_token_id) == (70000, 70000, 70000)
        assert generation.top_p == 0.9
        assert model.config.vocab_size == len(model.lm_head.weight) == 70144
        assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (70020, 70000, 70000)
        assert template_of(tokenizer) == TEMPLATES[name or "codeshell_chat"]
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": "hi"}], tokenize=False, add_generation_prompt=True
        )
        assert text.endswith(
            {None: "## human:hi |<end>| ## assistant:", "shellv": "## huaman:hi<|endoftext|>## assistant:"}[name]
        )


def broken(config, tensors, fault):
    tensors = dict(tensors)
    name = "transformer.h.1.attn.c_attn.weight"
    if fault == "missing":
        del tensors[name]
    elif fault == "unexpected":
        tensors["transformer.h.9.stray.weight"] = torch.zeros(2)
    elif fault == "shape":
        tensors[name] = torch.zeros(HIDDEN, HIDDEN)
    elif fault == "frequencies":
        tensors["transformer.h.0.attn.rotary_emb.inv_freq"] = torch.linspace(1, 0.1, HIDDEN // HEADS // 2)
    elif fault == "many":
        tensors = {key: value for key, value in tensors.items() if ".attn." not in key}
    else:
        config = {**config, **fault}
    return config, tensors


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"1 missing: transformer\.h\.1\.attn\.c_attn\.weight\. Nothing was written"),
        ("unexpected", r"1 unexpected: transformer\.h\.9\.stray\.weight"),
        ("shape", r"1 wrong shape: transformer\.h\.1\.attn\.c_attn\.weight is \(64, 64\), expected \(96, 64\)"),
        ("many", rf"{4 * LAYERS} missing: .* and {4 * LAYERS - 5} more"),
        ("frequencies", "not the frequencies of base 10000"),
        ({"position_embedding_type": "learned_absolute"}, "position_embedding_type='learned_absolute'"),
        ({"rope_scaling": {"type": "yarn", "factor": 2.0}}, "rope_scaling=.*yarn.*linear or dynamic"),
        ({"rope_scaling": {"type": "linear"}}, "a number as factor"),
        ({"num_query_groups": 3}, "num_query_groups=3 do not divide"),
        ({"quantization_config": {"bits": 4}}, "quantized"),
        ({"n_layer": LAYERS + 1}, r"12 missing: transformer\.h\.2\.ln_1\.weight"),
    ],
)
def test_a_checkpoint_that_does_not_fit_is_refused_and_nothing_written(tmp_path, fault, message):
    config = codeshell_config()
    write_checkpoint(tmp_path / "in", *broken(config, codeshell_tensors(config), fault))
    with pytest.raises(ModelError, match=message):
        convert(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("lost shard", "lacks 1 of its 2 shards: model-00002"),
        ("index", "disagree about lm_head"),
        ("escape", r"names '\.\./model"),
        ("no json", "is no index of weights"),
        ("truncated", "no safetensors file"),
    ],
)
def test_damaged_shards_are_named(tmp_path, fault, message):
    config = codeshell_config()
    write_checkpoint(tmp_path / "in", config, codeshell_tensors(config), "safetensors shards")
    index = tmp_path / "in" / "model.safetensors.index.json"
    shard = tmp_path / "in" / "model-00002-of-00002.safetensors"
    content = json.loads(index.read_text())
    if fault == "lost shard":
        shard.unlink()
    elif fault == "index":
        del content["weight_map"]["lm_head.weight"]
    elif fault == "escape":
        content["weight_map"]["lm_head.weight"] = "../model.safetensors"
    elif fault == "truncated":
        shard.write_bytes(shard.read_bytes()[:1000])
    index.write_text("{" if fault == "no json" else json.dumps(content))
    with pytest.raises(ModelError, match=message):
        convert(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


class Malicious:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        import os

        return (os.system, (f"touch {self.target}",))


@pytest.mark.parametrize("new_format", [True, False], ids=["zip", "old"])
@pytest.mark.parametrize("where", ["value", "whole"])
def test_a_malicious_pickle_runs_nothing(tmp_path, new_format, where):
    config = codeshell_config()
    write_checkpoint(tmp_path / "in", config, codeshell_tensors(config), "bin")
    victim = tmp_path / "ran"
    attack = Malicious(victim)
    torch.save(
        {"lm_head.weight": attack} if where == "value" else attack,
        tmp_path / "in" / "pytorch_model.bin",
        _use_new_zipfile_serialization=new_format,
    )
    with pytest.raises(ModelError, match=r"pytorch_model\.bin is refused: it holds more than tensors"):
        convert(tmp_path / "in", tmp_path / "out")
    assert not victim.exists()
    torch.load(tmp_path / "in" / "pytorch_model.bin", weights_only=False)
    assert victim.exists(), "the attack of this test does not work"


@pytest.mark.parametrize(("content", "message"), [([1], "holds list"), ({"a": 3}, "names to tensors")])
def test_a_pickle_of_something_else(tmp_path, content, message):
    config = codeshell_config()
    write_checkpoint(tmp_path / "in", config, codeshell_tensors(config), "bin")
    torch.save(content, tmp_path / "in" / "pytorch_model.bin")
    with pytest.raises(ModelError, match=message):
        convert(tmp_path / "in", tmp_path / "out")


def test_an_existing_output_is_left_alone(tmp_path):
    config = codeshell_config()
    write_checkpoint(tmp_path / "in", config, codeshell_tensors(config))
    (tmp_path / "out").mkdir()
    convert(tmp_path / "in", tmp_path / "out")
    with pytest.raises(OutputNotEmptyError, match="not an empty directory"):
        convert(tmp_path / "in", tmp_path / "out")
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OutputNotEmptyError):
        convert(tmp_path / "in", tmp_path / "file")
    with pytest.raises(OutputNotEmptyError):
        convert(tmp_path / "in", tmp_path / "in")
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_bias": False}, "use_bias=False"),
        ({"sliding_window": 16}, "sliding_window=16"),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 5e5}}, "rope_theta=500000"),
    ],
)
def test_what_codeshell_does_not_have_is_not_exported(tmp_path, changes, message):
    from transformers import Starcoder2Config, Starcoder2ForCausalLM

    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = Starcoder2Config(**sizes, num_key_value_heads=1, vocab_size=20, **changes)
    Starcoder2ForCausalLM(config).save_pretrained(tmp_path / "in")
    with pytest.raises(ModelError, match=message):
        export(tmp_path / "in", tmp_path / "out", "codeshell")
    assert not (tmp_path / "out").exists()


MEASURE = """
import re, sys
from pathlib import Path
from shellv_core.models.exporting import export
from shellv_core.models.importing import convert
folder = Path(sys.argv[1])
def peak():
    # Not resource.getrusage: that starts from the parent's peak.
    return 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def run(container, size):
    convert(folder / size / container, folder / size / f"{container} out")
    export(folder / size / f"{container} out", folder / size / f"{container} back", "codeshell")
containers = sys.argv[2:]
for container in containers:
    run(container, "small")
before = peak()
for container in containers:
    run(container, "large")
    print(peak() - before)
"""


def test_two_shards_convert_within_little_more_than_the_larger(tmp_path):
    """There and back, from both kinds of files; small models first, so that code is not counted."""
    containers = ("safetensors shards", "bin shards")
    large = {"n_embd": 1024, "n_head": 16, "num_query_groups": 4, "n_inner": 4096, "n_layer": 7, "vocab_size": 1200}
    for size, changes in (("small", {}), ("large", large)):
        config = codeshell_config(**changes)
        tensors = codeshell_tensors(config)
        for container in containers:
            write_checkpoint(tmp_path / size / container, config, tensors, container)
    shards = [path.stat().st_size for path in (tmp_path / "large").glob("*/*-of-00002.*")]
    assert min(shards) > 120e6
    program = [sys.executable, "-c", MEASURE, str(tmp_path), *containers]
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(program, capture_output=True, text=True, check=True, cwd=root)
    peaks = [int(line) for line in done.stdout.splitlines()[-2:]]
    print("peak memory over the larger shard:", [round(peak / max(shards), 2) for peak in peaks])
    assert peaks[0] > 0
    assert max(peaks) < 1.3 * max(shards)
    for container in containers:
        assert same(without_buffers(tensors), read_all(tmp_path / "large" / f"{container} back"))
