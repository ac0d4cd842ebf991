"""LLaVA-1.5's and Shell-V's formats become stock models, and come back bit by bit."""

from __future__ import annotations

import importlib.util
import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, CLIPVisionModel, LlamaForCausalLM

from shellv_core.errors import ModelError
from shellv_core.models.compose import load_model
from shellv_core.models.config import LoraConfig
from shellv_core.models.exporting import export
from shellv_core.models.importing import convert
from shellv_core.models.lora import add_lora, load_adapter, merge_adapter, save_adapter
from shellv_core.models.weights import read_weights
from shellv_core.templates import TEMPLATES, template_of
from tests.data.tiny_tokenizers import REAL
from tests.models.checkpoints_tiny import (
    CLIP_SIZES,
    FAMILIES,
    HIDDEN,
    LLAVA_SETTINGS,
    TOKENS,
    clip_directory,
    clip_tensors,
    codeshell_config,
    codeshell_logits,
    language_model,
    llava_checkpoint,
    logits_of,
    projector_tensors,
    sentence_piece_tokenizer,
    write_checkpoint,
)
from tests.models.test_codeshell import CONTAINERS, Malicious, read_all, same, without_buffers

FORMS = ("llava", "shellv")
EMBEDDINGS = {"llava": "model.embed_tokens.weight", "shellv": "transformer.wte.weight"}


def projected(tensors, features):
    """LLaVA's projector from its definition: linear layers with the exact GELU between."""
    layers = sorted({name.rpartition(".")[0] for name in tensors})
    for index, layer in enumerate(layers):
        dot = f"{layer}." if layer else ""
        if index:
            features = 0.5 * features * (1 + torch.erf(features / 2**0.5))
        features = features @ tensors[f"{dot}weight"].T + tensors[f"{dot}bias"]
    return features


def check_stock(directory, form, text, projector, vocab_size):
    """Load a converted model, compare all its parts with their sources, and look at what the files say."""
    model, processor = load_model(directory)
    assert type(model).__name__ == "LlavaForConditionalGeneration"
    features = torch.randn(1, 4, CLIP_SIZES["hidden_size"], generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        actual = model.model.multi_modal_projector(features)
    torch.testing.assert_close(actual, projected(projector, features), atol=1e-6, rtol=1e-5)
    tower = model.model.vision_tower.state_dict()
    assert all(torch.equal(tower[name], tensor) for name, tensor in clip_tensors().items())
    input_ids = torch.arange(3, 25)[None]
    logits = logits_of(model, input_ids)[..., :vocab_size]
    if form == "shellv":
        expected = codeshell_logits(codeshell_config(), text, input_ids)
    else:
        from transformers import LlamaConfig

        reference = LlamaForCausalLM(LlamaConfig(**FAMILIES["llava"][1]()))
        reference.load_state_dict(text)
        expected = logits_of(reference.eval(), input_ids)
    torch.testing.assert_close(logits, expected, atol=2e-5, rtol=1e-5)
    with safe_open(directory / "model.safetensors", "pt") as file:
        heads = {name.split("layers")[0].split("embed")[0] for name in file.keys()}  # noqa: SIM118
    # The layout that vLLM reads, for its native models too.
    assert {"language_model.model.", "vision_tower.vision_model.encoder."} <= heads
    assert not [name for name in heads if name.startswith("model.")]
    return model, processor


def answers(model, processor):
    question = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Where is the dog?"}]}]
    text = processor.apply_chat_template(question, add_generation_prompt=True)
    batch = processor(images=Image.new("RGB", (50, 30), (200, 10, 10)), text=text, return_tensors="pt")
    assert (batch["input_ids"] == model.config.image_token_id).sum() == model.config.image_seq_length == 4
    return model.generate(**batch, max_new_tokens=4, do_sample=False)


TEMPLATE_NAMES = {"llava": "v1", "shellv": "shellv"}


def model_rows(form):
    return FAMILIES[form][1]()["vocab_size"]


@pytest.mark.parametrize("projector", ["linear", "mlp1x_gelu", "mlp2x_gelu"])
@pytest.mark.parametrize("form", FORMS)
def test_a_whole_checkpoint_becomes_stock_and_comes_back(tmp_path, form, projector):
    tensors = llava_checkpoint(form, tmp_path / "in", projector=projector)
    said = convert(tmp_path / "in", tmp_path / "out")
    assert {"llava": "is a LLaVA-1.5 checkpoint", "shellv": "is a Shell-V checkpoint"}[form] in said
    text = {name: t for name, t in tensors.items() if "mm_projector" not in name and "vision_tower" not in name}
    model, processor = check_stock(tmp_path / "out", form, text, projector_tensors(projector), model_rows(form))
    assert template_of(processor) == TEMPLATES[TEMPLATE_NAMES[form]]
    assert answers(model, processor).shape[1] > 4

    export(tmp_path / "out", tmp_path / "back", form)
    back = read_all(tmp_path / "back")
    if projector == "mlp1x_gelu":
        # One linear layer, by its other name.
        back = {name.replace("mm_projector.", "mm_projector.0."): t for name, t in back.items()}
    assert same(back, without_buffers(tensors))
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("in", "back"))
    kept = {"architectures", "vocab_size", "image_aspect_ratio", "hidden_size", "n_embd", "rope_theta", "rope_scaling"}
    kept |= {name for name in before if name.startswith("mm_")} - {"mm_vision_tower", "mm_resampler_type"}
    kept = {name for name in kept if name in before} - ({"mm_projector_type"} if projector == "mlp1x_gelu" else set())
    assert not {"max_length", "image_grid_pinpoints", "mm_hidden_size"} & set(model.config.text_config.to_dict())
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    convert(tmp_path / "back", tmp_path / "again")
    assert same(read_all(tmp_path / "again"), read_all(tmp_path / "out"))


@pytest.mark.parametrize("container", CONTAINERS[1:])
@pytest.mark.parametrize("form", FORMS)
def test_every_kind_of_file(tmp_path, form, container):
    tensors = llava_checkpoint(form, tmp_path / "in", container)
    convert(tmp_path / "in", tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back", form)
    assert same(read_all(tmp_path / "back"), without_buffers(tensors))


def test_what_only_training_needs_is_left_out(tmp_path):
    tensors = llava_checkpoint("llava", tmp_path / "in")
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
        "model.vision_projector.weight": torch.zeros(HIDDEN // 4, HIDDEN),
        "model.itc_temp": torch.tensor(0.07),
        "model.vision_tower.vision_tower.vision_model.embeddings.position_ids": torch.arange(5)[None],
    }
    save_file({**tensors, **more}, tmp_path / "in" / "model.safetensors")
    convert(tmp_path / "in", tmp_path / "out")
    export(tmp_path / "out", tmp_path / "back", "llava")
    assert same(read_all(tmp_path / "back"), tensors)


@pytest.mark.parametrize("form", FORMS)
def test_the_image_token_gets_a_row_where_there_is_none(tmp_path, form):
    """As in a checkpoint whose vocabulary was cut to the tokenizer's length."""
    _, make_config, make_tensors, _, _ = FAMILIES[form]
    config = make_config(vocab_size=TOKENS)
    text = make_tensors(config)
    llava_checkpoint(form, tmp_path / "in", text=text, vocab_size=TOKENS)
    convert(tmp_path / "in", tmp_path / "out")
    model, processor = load_model(tmp_path / "out")
    assert model.config.image_token_id == TOKENS
    assert len(processor.tokenizer) == model.config.text_config.vocab_size == TOKENS + 1
    for rows, original in (
        (model.get_input_embeddings().weight, text[EMBEDDINGS[form]]),
        (model.lm_head.weight, text["lm_head.weight"]),
    ):
        assert torch.equal(rows[:TOKENS], original)
        torch.testing.assert_close(rows[TOKENS], original.mean(dim=0))
    export(tmp_path / "out", tmp_path / "back", form)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["vocab_size"] == TOKENS
    assert torch.equal(read_all(tmp_path / "back")[EMBEDDINGS[form]], text[EMBEDDINGS[form]])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("missing", r"1 missing: .*"),
        ("unexpected", r"1 unexpected: .*stray"),
        ("shape", r"1 wrong shape: .*linear_1\.weight is \(64, 3\), expected \(64, 64\)"),
        ("tower", r"1 missing: model\.vision_tower\.encoder\.layers\.1\.mlp\.fc1\.bias"),
        ("longer projector", r"'4\.bias'.*two linear layers"),
    ],
)
def test_every_key_is_accounted_for(tmp_path, form, fault, message):
    tensors = llava_checkpoint(form, tmp_path / "in")
    prefix = FAMILIES[form][0]
    if fault == "missing":
        tensors.pop("lm_head.weight" if form == "llava" else "transformer.ln_f.bias")
    elif fault == "unexpected":
        tensors[f"{prefix}stray.weight"] = torch.zeros(2)
    elif fault == "shape":
        tensors[f"{prefix}mm_projector.0.weight"] = torch.zeros(HIDDEN, 3)
    elif fault == "tower":
        del tensors[f"{prefix}vision_tower.vision_tower.vision_model.encoder.layers.1.mlp.fc1.bias"]
    else:
        tensors |= {f"{prefix}mm_projector.{n}": t for n, t in projector_tensors("mlp3x_gelu").items()}
    save_file(tensors, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ModelError, match=message):
        convert(tmp_path / "in", tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_vision_tower_from_elsewhere(tmp_path):
    tensors = llava_checkpoint("llava", tmp_path / "in")
    without = {name: tensor for name, tensor in tensors.items() if "vision_tower" not in name}
    save_file(without, tmp_path / "in" / "model.safetensors")
    with pytest.raises(ModelError, match=r"has no vision tower .*--vision-tower DIR"):
        convert(tmp_path / "in", tmp_path / "out")
    convert(tmp_path / "in", tmp_path / "out", vision_tower=clip_directory(tmp_path / "clip"))
    tower = load_model(tmp_path / "out")[0].model.vision_tower.state_dict()
    assert all(torch.equal(tower[name], tensor) for name, tensor in clip_tensors().items())


@pytest.mark.parametrize("kind", ["CLIP", "SigLIP"])
def test_a_tower_inside_a_whole_contrastive_model(tmp_path, kind):
    from transformers import CLIPConfig, CLIPModel, SiglipConfig, SiglipModel

    text = {
        "hidden_size": 32,
        "intermediate_size": 32,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "vocab_size": 9,
    }
    config_class, model_class = {"CLIP": (CLIPConfig, CLIPModel), "SigLIP": (SiglipConfig, SiglipModel)}[kind]
    config = config_class(text_config={**text, "vocab_size": 9}, vision_config={**CLIP_SIZES, "num_attention_heads": 4})
    original = model_class(config)
    original.save_pretrained(tmp_path / "whole")
    (tmp_path / "whole" / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3]}))
    language_model("llava", tmp_path / "base")
    projector_file(tmp_path / "stage1", "llava")
    convert(tmp_path / "stage1", tmp_path / "out", base=tmp_path / "base", vision_tower=tmp_path / "whole")
    model, processor = load_model(tmp_path / "out")
    tower = model.model.vision_tower.state_dict()
    expected = {n.removeprefix("vision_model."): t for n, t in original.state_dict().items() if "vision_model." in n}
    assert same(tower, {name: t for name, t in expected.items() if "position_ids" not in name})
    assert list(processor.image_processor.image_mean) == [0.1, 0.2, 0.3]
    assert list(processor.image_processor.image_std) == (
        [0.5] * 3 if kind == "SigLIP" else [0.26862954, 0.26130258, 0.27577711]
    )
    assert model.config.vision_feature_select_strategy == {"CLIP": "default", "SigLIP": "full"}[kind]
    assert answers(model, processor).shape[1] > 4


def projector_file(directory, form, kind="mlp2x_gelu", with_config=True, rows=None, **settings):
    directory.mkdir()
    prefix = FAMILIES[form][0]
    tensors = {f"{prefix}mm_projector.{name}": tensor for name, tensor in projector_tensors(kind).items()}
    if rows is not None:
        tensors[f"{prefix}embed_tokens.weight"] = rows
    torch.save(tensors, directory / "mm_projector.bin")
    if with_config:
        settings = {**LLAVA_SETTINGS, "mm_projector_type": kind, **settings}
        (directory / "config.json").write_text(json.dumps({**FAMILIES[form][1](), **settings}))
    return tensors


@pytest.mark.parametrize("kind", ["linear", "mlp2x_gelu"])
@pytest.mark.parametrize("base", ["llava", "shellv", "starcoder2"])
def test_a_projector_alone(tmp_path, base, kind):
    form = "llava" if base == "llava" else "shellv"
    _, text = language_model(form, tmp_path / "base")
    if base == "starcoder2":
        convert(tmp_path / "base", tmp_path / "starcoder2")
    tensors = projector_file(tmp_path / "stage1", form, kind, with_config=kind == "linear")
    clip = clip_directory(tmp_path / "clip")
    owner = tmp_path / ("starcoder2" if base == "starcoder2" else "base")
    source = tmp_path / "stage1" / ("mm_projector.bin" if kind == "linear" else "")
    convert(source, tmp_path / "out", base=owner, vision_tower=clip)
    check_stock(tmp_path / "out", form, text, projector_tensors(kind), model_rows(form))
    export(tmp_path / "out", tmp_path / "back", "mm_projector")
    assert same(torch.load(tmp_path / "back" / "mm_projector.bin", weights_only=True), tensors)
    with pytest.raises(ModelError, match=r"is a projector alone.*--base DIR"):
        convert(source, tmp_path / "no")
    with pytest.raises(ModelError, match=r"without a vision tower.*--vision-tower DIR"):
        convert(source, tmp_path / "no", base=owner)


@pytest.mark.parametrize("whole", [False, True], ids=["two rows", "all rows"])
@pytest.mark.parametrize("form", FORMS)
def test_rows_of_start_and_end_tokens(tmp_path, form, whole):
    """Two rows at the tokens' ids, or the whole matrix of the tokenizer's length, as LLaVA saves it."""
    _, text = language_model(form, tmp_path / "base")
    new = torch.randn(2, HIDDEN)
    # To the tokenizer, <im_patch>, <im_start>, <im_end> are added.
    rows = torch.cat([torch.randn(TOKENS + 1, HIDDEN), new]) if whole else new
    projector_file(tmp_path / "stage1", form, rows=rows, mm_use_im_start_end=True, mm_use_im_patch_token=True)
    clip = clip_directory(tmp_path / "clip")
    convert(tmp_path / "stage1", tmp_path / "out", base=tmp_path / "base", vision_tower=clip)
    model, processor = load_model(tmp_path / "out")
    ids = processor.tokenizer.convert_tokens_to_ids(["<im_patch>", "<im_start>", "<im_end>", "<image>"])
    assert ids == [TOKENS + i for i in range(4)]
    embeddings = model.get_input_embeddings().weight
    assert torch.equal(embeddings[TOKENS + 1 : TOKENS + 3], new)
    assert torch.equal(embeddings[: TOKENS + 1], rows[:-2] if whole else text[EMBEDDINGS[form]][: TOKENS + 1])
    prompt = processor.apply_chat_template([{"role": "user", "content": [{"type": "image"}]}])
    assert "<im_start><image><im_end>" in prompt
    export(tmp_path / "out", tmp_path / "back", "mm_projector")
    back = torch.load(tmp_path / "back" / "mm_projector.bin", weights_only=True)
    assert torch.equal(back[f"{FAMILIES[form][0]}embed_tokens.weight"], new)
    (tmp_path / "stage1" / "config.json").unlink()
    if not whole:
        with pytest.raises(ModelError, match="mm_use_im_start_end=true"):
            convert(tmp_path / "stage1", tmp_path / "no", base=tmp_path / "base", vision_tower=clip)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("extra", r"holds 1 tensors beside a projector .*layers\.0"),
        ("missing", r"has the keys .*mlp2x_gelu"),
        ("shape", r"1 wrong shape: model\.multi_modal_projector\.linear_2\.weight"),
        ("malicious", "is refused"),
        ("config", "are those of 'mlp2x_gelu', but its config.json says mm_projector_type='linear'"),
    ],
)
def test_a_projector_that_does_not_fit(tmp_path, fault, message):
    language_model("llava", tmp_path / "base")
    tensors = projector_file(tmp_path / "stage1", "llava")
    if fault == "extra":
        tensors["model.layers.0.weight"] = torch.zeros(2)
    elif fault == "missing":
        del tensors["model.mm_projector.2.bias"]
    elif fault == "shape":
        tensors["model.mm_projector.2.weight"] = torch.zeros(HIDDEN, 5)
    elif fault == "config":
        config = {**LLAVA_SETTINGS, "mm_projector_type": "linear"}
        (tmp_path / "stage1" / "config.json").write_text(json.dumps(config))
    else:
        tensors["model.mm_projector.2.weight"] = Malicious(tmp_path / "ran")
    torch.save(tensors, tmp_path / "stage1" / "mm_projector.bin")
    clip = clip_directory(tmp_path / "clip")
    with pytest.raises(ModelError, match=message):
        convert(tmp_path / "stage1", tmp_path / "out", base=tmp_path / "base", vision_tower=clip)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "stage1", "clip"}


def lora_directory(directory, form, modules, rank=4, alpha=8, trainables=True, **settings):
    """An adapter as upstream's training leaves it; returns A and B by module."""
    directory.mkdir()
    generator = torch.Generator().manual_seed(5)
    prefix = FAMILIES[form][0]
    pairs = {
        module: tuple(0.1 * torch.randn(*each, generator=generator) for each in ((rank, shape[1]), (shape[0], rank)))
        for module, shape in modules.items()
    }
    tensors = {}
    for module, (a, b) in pairs.items():
        tensors |= {f"base_model.model.{module}.lora_A.weight": a, f"base_model.model.{module}.lora_B.weight": b}
    torch.save(tensors, directory / "adapter_model.bin")
    names = sorted({module.rpartition(".")[2] for module in modules})
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": alpha, "bias": "none", "target_modules": names, **settings}
    (directory / "adapter_config.json").write_text(json.dumps(config))
    (directory / "config.json").write_text(json.dumps({**FAMILIES[form][1](), **LLAVA_SETTINGS}))
    if trainables:
        saved = {f"base_model.model.{prefix}mm_projector.{n}": t for n, t in projector_tensors().items()}
        torch.save(saved, directory / "non_lora_trainables.bin")
    return pairs


HEAD_SIZE = HIDDEN // 8
MODULES = {
    "llava": {
        "model.layers.0.self_attn.q_proj": (HIDDEN, HIDDEN),
        "model.layers.1.mlp.down_proj": (HIDDEN, 96),
    },
    "shellv": {
        "transformer.h.0.attn.c_attn": (HIDDEN + 4 * HEAD_SIZE, HIDDEN),
        "transformer.h.1.mlp.c_fc": (96, HIDDEN),
        # Shell-V adapts the projector too.
        "transformer.mm_projector.2": (HIDDEN, HIDDEN),
    },
}


@pytest.mark.parametrize("form", FORMS)
def test_a_lora_adapter_is_merged(tmp_path, form):
    _, text = language_model(form, tmp_path / "base")
    pairs = lora_directory(tmp_path / "lora", form, MODULES[form])
    clip = clip_directory(tmp_path / "clip")
    convert(tmp_path / "lora", tmp_path / "out", base=tmp_path / "base", vision_tower=clip)
    projector = projector_tensors()
    merged = dict(text)
    for module, (a, b) in pairs.items():
        if "mm_projector" in module:
            projector["2.weight"] = projector["2.weight"] + 2 * b @ a
        else:
            merged[f"{module}.weight"] = text[f"{module}.weight"] + 2 * b @ a
    check_stock(tmp_path / "out", form, merged, projector, model_rows(form))


def test_merging_agrees_with_peft(tmp_path):
    from peft import LoraConfig as PeftConfig
    from peft import get_peft_model
    from transformers import LlamaConfig

    config, text = language_model("llava", tmp_path / "base")
    base = LlamaForCausalLM(LlamaConfig(**config))
    base.load_state_dict(text)
    targets = ["q_proj", "v_proj", "down_proj"]
    settings = PeftConfig(r=4, lora_alpha=6, use_rslora=True, target_modules=targets, rank_pattern={"v_proj": 2})
    model = get_peft_model(base, settings)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    model.save_pretrained(tmp_path / "lora")
    projector = {f"base_model.model.model.mm_projector.{n}": t for n, t in projector_tensors().items()}
    torch.save(projector, tmp_path / "lora" / "non_lora_trainables.bin")
    (tmp_path / "lora" / "config.json").write_text(json.dumps({**config, **LLAVA_SETTINGS}))
    convert(tmp_path / "lora", tmp_path / "out", base=tmp_path / "base", vision_tower=clip_directory(tmp_path / "clip"))
    merged = model.merge_and_unload().state_dict()
    actual = load_model(tmp_path / "out")[0].state_dict()
    for name, tensor in merged.items():
        own = actual[name.replace("model.", "model.language_model.", 1)]
        torch.testing.assert_close(own, tensor, atol=1e-6, rtol=1e-5)
    assert not torch.equal(
        merged["model.layers.0.self_attn.q_proj.weight"], text["model.layers.0.self_attn.q_proj.weight"]
    )


@pytest.mark.parametrize("form", FORMS)
def test_an_adapter_is_kept_and_comes_back(tmp_path, form):
    language_model(form, tmp_path / "base")
    modules = {module: shape for module, shape in MODULES[form].items() if "mm_projector" not in module}
    pairs = lora_directory(tmp_path / "lora", form, modules)
    clip = clip_directory(tmp_path / "clip")
    options = {"base": tmp_path / "base", "vision_tower": clip}
    convert(tmp_path / "lora", tmp_path / "kept", keep_adapter=True, **options)
    convert(tmp_path / "lora", tmp_path / "merged", **options)
    merge_adapter(tmp_path / "kept" / "base", tmp_path / "kept" / "adapter", tmp_path / "ours")
    left, right = load_model(tmp_path / "ours")[0].state_dict(), load_model(tmp_path / "merged")[0].state_dict()
    for name, tensor in left.items():
        torch.testing.assert_close(tensor, right[name], atol=1e-6, rtol=1e-5)

    export(tmp_path / "kept" / "adapter", tmp_path / "back", "lora", base=tmp_path / "kept" / "base")
    back = load_file(tmp_path / "back" / "adapter_model.safetensors")
    assert same(back, torch.load(tmp_path / "lora" / "adapter_model.bin", weights_only=True))
    trainables = [torch.load(tmp_path / n / "non_lora_trainables.bin", weights_only=True) for n in ("lora", "back")]
    assert same(*trainables)
    settings = json.loads((tmp_path / "back" / "adapter_config.json").read_text())
    assert (settings["r"], settings["lora_alpha"]) == (4, 8)
    # In part of the layers only, so by their full names.
    assert set(settings["target_modules"]) == set(pairs)


@pytest.mark.parametrize("use_rslora", [False, True])
@pytest.mark.parametrize("form", FORMS)
def test_our_adapter_goes_out_and_comes_back(tmp_path, form, use_rslora):
    """Query, key and value have an A each here; CodeShell's fused matrix holds them block by block."""
    llava_checkpoint(form, tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "model")
    model, _ = load_model(tmp_path / "model")
    adapted = add_lora(model, LoraConfig(r=4, alpha=8))
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    save_adapter(adapted, tmp_path / "adapter", "model")
    if use_rslora:
        path = tmp_path / "adapter" / "adapter_config.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "use_rslora": True}))
    export(tmp_path / "adapter", tmp_path / "upstream", "lora", base=tmp_path / "model")
    prefix = FAMILIES[form][0]
    out = load_file(tmp_path / "upstream" / "adapter_model.safetensors")
    assert all(name.startswith((f"base_model.model.{prefix}layers", f"base_model.model.{prefix}h.")) for name in out)
    names = {
        "llava": {f"self_attn.{n}_proj" for n in "qkvo"} | {f"mlp.{n}_proj" for n in ("gate", "up", "down")},
        "shellv": {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"},
    }
    settings = json.loads((tmp_path / "upstream" / "adapter_config.json").read_text())
    assert set(settings["target_modules"]) == names[form]
    convert(tmp_path / "upstream", tmp_path / "kept", base=tmp_path / "model", keep_adapter=True)
    files = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("adapter", "kept/adapter")]
    assert same(*files)

    # Upstream merges at load; that gives the same model as our merge.
    convert(tmp_path / "upstream", tmp_path / "merged", base=tmp_path / "model")
    base, _ = load_model(tmp_path / "model")
    expected = load_adapter(base, tmp_path / "adapter").merge_and_unload().state_dict()
    actual = load_model(tmp_path / "merged")[0].state_dict()
    assert set(actual) == set(expected)
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("half", r"without their other half \['model\.layers\.0\.self_attn\.q_proj'\]"),
        ("extra", r"unexpected \['base_model\.model\.model\.norm\.stray'\]"),
        ("dora", "use_dora.*only plain LoRA"),
        ("bias", "bias='all'"),
        ("no projector", r"no non_lora_trainables\.bin, and its base no projector"),
        ("other base", r"changes model\.layers\.1\.mlp\.down_proj by \(64, 96\), but the base has \(64, 80\)"),
        ("unknown module", r"changes model\.layers\.7\.self_attn\.q_proj .* no such module"),
        ("no weights", "no adapter weights"),
        ("malicious adapter", "adapter_model.bin is refused"),
        ("malicious trainables", "non_lora_trainables.bin is refused"),
    ],
)
def test_an_adapter_that_does_not_fit(tmp_path, fault, message):
    language_model("llava", tmp_path / "base", **({"intermediate_size": 80} if fault == "other base" else {}))
    modules = MODULES["llava"]
    if fault == "unknown module":
        modules = {"model.layers.7.self_attn.q_proj": (HIDDEN, HIDDEN)}
    settings = {"dora": {"use_dora": True}, "bias": {"bias": "all"}}.get(fault, {})
    lora_directory(tmp_path / "lora", "llava", modules, trainables=fault != "no projector", **settings)
    file = tmp_path / "lora" / "adapter_model.bin"
    tensors = torch.load(file, weights_only=True)
    if fault == "half":
        del tensors["base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"]
    elif fault == "extra":
        tensors["base_model.model.model.norm.stray"] = torch.zeros(2)
    elif fault == "malicious adapter":
        tensors["x"] = Malicious(tmp_path / "ran")
    elif fault == "malicious trainables":
        torch.save({"x": Malicious(tmp_path / "ran")}, tmp_path / "lora" / "non_lora_trainables.bin")
    torch.save(tensors, file)
    if fault == "no weights":
        file.unlink()
    clip = clip_directory(tmp_path / "clip")
    with pytest.raises(ModelError, match=message):
        convert(tmp_path / "lora", tmp_path / "out", base=tmp_path / "base", vision_tower=clip)
    assert {path.name for path in tmp_path.iterdir()} == {"base", "lora", "clip"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_delta_weights(tmp_path, form, dtype):
    _, make_config, make_tensors, _, _ = FAMILIES[form]
    base = make_tensors(make_config(), seed=0, dtype=dtype)
    write_checkpoint(tmp_path / "base", make_config(), base)
    tuned = make_tensors(make_config(), seed=9, dtype=dtype)
    grown = {EMBEDDINGS[form], "lm_head.weight"}
    # Two more rows than the base has, as after adding tokens.
    tuned = {n: torch.cat([t, torch.randn(2, HIDDEN).to(dtype)]) if n in grown else t for n, t in tuned.items()}
    target = llava_checkpoint(form, tmp_path / "target", text=tuned, vocab_size=make_config()["vocab_size"] + 2)
    convert(tmp_path / "target", tmp_path / "model")
    export(tmp_path / "model", tmp_path / "delta", "delta", base=tmp_path / "base")
    delta = read_all(tmp_path / "delta")
    name = next(iter(base))
    rows = len(base[name])
    difference = target[name][:rows].double() - base[name].double()
    torch.testing.assert_close(delta[name][:rows].double(), difference, atol=1e-2, rtol=1e-2)
    with pytest.raises(ModelError, match="say so with --delta"):
        convert(tmp_path / "delta", tmp_path / "no", base=tmp_path / "base")
    convert(tmp_path / "delta", tmp_path / "restored", base=tmp_path / "base", delta=True)
    assert same(read_all(tmp_path / "restored"), read_all(tmp_path / "model"))

    # A delta of another base.
    write_checkpoint(tmp_path / "delta2", json.loads((tmp_path / "delta" / "config.json").read_text()), delta)
    broken = {name: tensor for name, tensor in read_all(tmp_path / "delta").items() if name != "lm_head.weight"}
    broken["model.stray.weight"] = torch.zeros(2)
    save_file(broken, tmp_path / "delta2" / "model.safetensors")
    with pytest.raises(ModelError, match=r"1 missing \['lm_head\.weight'\], 1 unexpected \['model\.stray\.weight'\]"):
        convert(tmp_path / "delta2", tmp_path / "no", base=tmp_path / "base", delta=True)


def test_upstreams_own_half_precision_deltas_apply(tmp_path):
    _, make_config, make_tensors, _, _ = FAMILIES["llava"]
    config = make_config()
    base, tuned = (make_tensors(config, seed, torch.float16) for seed in (0, 9))
    write_checkpoint(tmp_path / "base", config, base)
    delta = {name: tuned[name] - base[name] for name in base}
    llava_checkpoint("llava", tmp_path / "delta", text=delta)
    convert(tmp_path / "delta", tmp_path / "out", base=tmp_path / "base", delta=True)
    actual = read_weights(tmp_path / "out")["language_model.model.layers.0.mlp.up_proj.weight"].read()
    assert torch.equal(actual, base["model.layers.0.mlp.up_proj.weight"] + delta["model.layers.0.mlp.up_proj.weight"])


def test_formats_that_cannot_hold_a_model(tmp_path):
    llava_checkpoint("llava", tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "model")
    for form, message in (
        ("shellv", "which is of the format 'llava', not 'shellv'"),
        ("codeshell", "a language model is expected"),
        ("lora", "needs the LLaVA model"),
        ("delta", "needs the language model"),
        ("lava", "did you mean 'llava'"),
    ):
        with pytest.raises(ModelError, match=message):
            export(tmp_path / "model", tmp_path / "out", form)
    with pytest.raises(ModelError, match="nothing to convert"):
        convert(tmp_path / "model", tmp_path / "out")
    with pytest.raises(ModelError, match="complete and takes no --base"):
        convert(tmp_path / "in", tmp_path / "out", base=tmp_path / "model")
    for source, message in (("nowhere", "does not exist"), (".", "holds no checkpoint")):
        with pytest.raises(ModelError, match=message):
            convert(tmp_path / source, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"in", "model"}


def test_options_that_mean_nothing_are_refused(tmp_path):
    language_model("shellv", tmp_path / "text")
    projector_file(tmp_path / "stage1", "shellv")
    llava_checkpoint("shellv", tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "model")
    clip = clip_directory(tmp_path / "clip")
    for source, options, named in (
        ("text", {"base": clip}, "--base"),
        ("text", {"vision_tower": clip}, "--vision-tower"),
        ("text", {"keep_adapter": True}, "--keep-adapter"),
        ("stage1", {"delta": True, "base": tmp_path / "text"}, "--delta"),
        ("stage1", {"vision_tower": clip, "base": tmp_path / "model"}, "--vision-tower"),
    ):
        with pytest.raises(ModelError, match=f"{named} means nothing"):
            convert(tmp_path / source, tmp_path / "out", **options)
    with pytest.raises(ModelError, match="nothing to do with --base"):
        export(tmp_path / "model", tmp_path / "out", "shellv", base=clip)
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(not REAL.is_dir(), reason="no tokenizer of CodeShell beside the project")
def test_shellvs_vocabulary_has_room_for_the_image_token(tmp_path):
    """70,144 rows, 70,020 tokens: nothing is cut and nothing added."""
    changes = {"vocab_size": 70144, "bos_token_id": 70000, "eos_token_id": 70000}
    text = FAMILIES["shellv"][2](codeshell_config(**changes))
    tensors = llava_checkpoint("shellv", tmp_path / "in", text=text, **changes)
    shutil.copytree(REAL, tmp_path / "in", dirs_exist_ok=True)
    convert(tmp_path / "in", tmp_path / "out")
    model, processor = load_model(tmp_path / "out")
    assert model.config.image_token_id == processor.tokenizer.convert_tokens_to_ids("<image>") == 70020
    assert torch.equal(model.get_input_embeddings().weight, text[EMBEDDINGS["shellv"]])
    assert model.generation_config.eos_token_id == model.generation_config.pad_token_id == 70000
    export(tmp_path / "out", tmp_path / "back", "shellv")
    assert same(read_all(tmp_path / "back"), without_buffers(tensors))


def test_the_path_says_nothing(tmp_path):
    """Upstream dispatches on words in the path; a CodeShell in a folder named after LLaVA stays one."""
    language_model("shellv", tmp_path / "llava-lora-mpt")
    assert "CodeShell language model" in convert(tmp_path / "llava-lora-mpt", tmp_path / "out")
    write_checkpoint(tmp_path / "odd", {"model_type": "gpt_unknown"}, {"a.weight": torch.zeros(2)})
    with pytest.raises(ModelError, match="of no known format: model_type='gpt_unknown'"):
        convert(tmp_path / "odd", tmp_path / "no")


def test_plain_transformers_reads_the_tower_of_a_converted_model(tmp_path):
    llava_checkpoint("shellv", tmp_path / "in")
    convert(tmp_path / "in", tmp_path / "out", template="chatml")
    processor = AutoProcessor.from_pretrained(tmp_path / "out")
    assert template_of(processor) == TEMPLATES["chatml"]
    assert processor.image_processor.do_pad
    assert isinstance(load_model(tmp_path / "out")[0].model.vision_tower, CLIPVisionModel)


def test_a_sentence_piece_tokenizer(tmp_path):
    """The published checkpoints have no tokenizer.json."""
    llava_checkpoint("llava", tmp_path / "in")
    size = sentence_piece_tokenizer(tmp_path / "in")
    if importlib.util.find_spec("sentencepiece") is None:
        with pytest.raises(ModelError, match="pip install sentencepiece"):
            convert(tmp_path / "in", tmp_path / "out")
        return
    convert(tmp_path / "in", tmp_path / "out")
    model, processor = load_model(tmp_path / "out")
    assert model.config.image_token_id == size
    assert processor.tokenizer("a dog").input_ids[0] == 1
    assert answers(model, processor).shape[1] > 4
    export(tmp_path / "out", tmp_path / "back", "llava")
    original, back = (tmp_path / name / "tokenizer.model" for name in ("in", "back"))
    assert back.read_bytes() == original.read_bytes()
