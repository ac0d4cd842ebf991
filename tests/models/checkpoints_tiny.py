"""Random checkpoints in upstream's formats, and CodeShell's forward pass written from its definitions."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch
from safetensors.torch import save_file

from tests.data.tiny_tokenizers import byte_level

#: Entries of `byte_tokenizer`.
TOKENS = 418
HIDDEN, HEADS, GROUPS, LAYERS, INNER, POSITIONS = 64, 8, 2, 2, 96, 32
CLIP_SIZES = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "patch_size": 14, "image_size": 28}


def codeshell_config(**changes):
    return {
        "architectures": ["CodeShellForCausalLM"],
        "model_type": "kclgpt",
        "auto_map": {"AutoConfig": "configuration_codeshell.CodeShellConfig"},
        "activation_function": "gelu_pytorch_tanh",
        "attn_pdrop": 0.1,
        "embd_pdrop": 0.1,
        "resid_pdrop": 0.1,
        "bos_token_id": 2,
        "eos_token_id": 2,
        "group_query_attention": True,
        "num_query_groups": GROUPS,
        "position_embedding_type": "rope",
        "rope_scaling": None,
        "layer_norm_epsilon": 1e-5,
        "initializer_range": 0.02,
        "n_embd": HIDDEN,
        "n_head": HEADS,
        "n_inner": INNER,
        "n_layer": LAYERS,
        "n_positions": POSITIONS,
        "vocab_size": 440,
        "use_cache": True,
        "torch_dtype": "float32",
        "transformers_version": "4.31.0",
        **changes,
    }


def codeshell_tensors(config, seed=0, dtype=torch.float32):
    """All tensors that CodeShellForCausalLM saves."""
    generator = torch.Generator().manual_seed(seed)
    hidden, inner = config["n_embd"], config["n_inner"] or 4 * config["n_embd"]
    size = hidden // config["n_head"]
    fused = hidden + 2 * config["num_query_groups"] * size

    def normal(*shape, std=0.15, mean=0.0):
        return (mean + std * torch.randn(*shape, generator=generator)).to(dtype)

    tensors = {"transformer.wte.weight": normal(config["vocab_size"], hidden, std=1.0)}
    for layer in range(config["n_layer"]):
        prefix = f"transformer.h.{layer}."
        for name, rows, columns in (
            ("attn.c_attn", fused, hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", inner, hidden),
            ("mlp.c_proj", hidden, inner),
        ):
            tensors[f"{prefix}{name}.weight"] = normal(rows, columns, std=columns**-0.5)
            tensors[f"{prefix}{name}.bias"] = normal(rows)
        for name in ("ln_1", "ln_2"):
            tensors[f"{prefix}{name}.weight"] = normal(hidden, mean=1.0)
            tensors[f"{prefix}{name}.bias"] = normal(hidden)
        frequencies = 1.0 / 10000 ** (torch.arange(0, size, 2).float() / size)
        tensors[f"{prefix}attn.rotary_emb.inv_freq"] = frequencies
    tensors["transformer.ln_f.weight"] = normal(hidden, mean=1.0)
    tensors["transformer.ln_f.bias"] = normal(hidden)
    tensors["lm_head.weight"] = normal(config["vocab_size"], hidden, std=hidden**-0.5)
    return tensors


def codeshell_logits(config, tensors, input_ids):
    """Logits (batch, length, vocabulary) of `input_ids` (batch, length), head by head and position by position."""
    hidden, heads, groups = config["n_embd"], config["n_head"], config["num_query_groups"]
    size, length = hidden // heads, input_ids.shape[1]

    def affine(x, name):
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    def norm(x, name):
        centered = x - x.mean(dim=-1, keepdim=True)
        scaled = centered / torch.sqrt(centered.pow(2).mean(dim=-1, keepdim=True) + config["layer_norm_epsilon"])
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def gelu_tanh(x):
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))

    cosines, sines = rotary_tables(config, size, length)

    def rotated(x):
        # (batch, length, size); the pair of a value stands half a head away.
        first, second = x[..., : size // 2], x[..., size // 2 :]
        return torch.cat([first * cosines - second * sines, second * cosines + first * sines], dim=-1)

    causal = torch.ones(length, length, dtype=torch.bool).tril()
    x = tensors["transformer.wte.weight"][input_ids]
    for layer in range(config["n_layer"]):
        prefix = f"transformer.h.{layer}."
        projected = affine(norm(x, f"{prefix}ln_1"), f"{prefix}attn.c_attn")
        outputs = []
        for head in range(heads):
            group = head // (heads // groups)
            query = rotated(projected[..., head * size : (head + 1) * size])
            key_start = hidden + group * size
            value_start = hidden + (groups + group) * size
            key = rotated(projected[..., key_start : key_start + size])
            value = projected[..., value_start : value_start + size]
            scores = query @ key.transpose(1, 2) / math.sqrt(size)
            outputs.append(scores.masked_fill(~causal, -math.inf).softmax(dim=-1) @ value)
        x = x + affine(torch.cat(outputs, dim=-1), f"{prefix}attn.c_proj")
        inner = gelu_tanh(affine(norm(x, f"{prefix}ln_2"), f"{prefix}mlp.c_fc"))
        x = x + affine(inner, f"{prefix}mlp.c_proj")
    return norm(x, "transformer.ln_f") @ tensors.get("lm_head.weight", tensors["transformer.wte.weight"]).T


def rotary_tables(config, size, length):
    """Cosines and sines, each (length, size / 2), as CodeShell's scaling wants them for a text of `length`."""
    scaling, base = config["rope_scaling"] or {}, 10000.0
    positions = torch.arange(length, dtype=torch.float64)
    if scaling.get("type") == "linear":
        positions = positions / scaling["factor"]
    if scaling.get("type") == "dynamic" and length > config["n_positions"]:
        growth = scaling["factor"] * length / config["n_positions"] - (scaling["factor"] - 1)
        base = base * growth ** (size / (size - 2))
    angles = torch.outer(positions, base ** -(torch.arange(0, size, 2, dtype=torch.float64) / size))
    return angles.cos().float(), angles.sin().float()


def clip_tensors(seed=1):
    """A CLIP vision tower's tensors, by the names of its module."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(seed)
    model = CLIPVisionModel(CLIPVisionConfig(**CLIP_SIZES, num_attention_heads=1))
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def llama_config(**changes):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
        "hidden_act": "silu",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_attention_heads": HEADS,
        "num_hidden_layers": LAYERS,
        "num_key_value_heads": GROUPS,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-6,
        "vocab_size": 430,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "torch_dtype": "float32",
        **changes,
    }


def llama_tensors(config, seed=0, dtype=torch.float32):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    model = LlamaForCausalLM(LlamaConfig(**{k: v for k, v in config.items() if k not in ("architectures",)}))
    return {name: (torch.randn_like(tensor) * 0.15).to(dtype) for name, tensor in model.state_dict().items()}


def projector_tensors(kind="mlp2x_gelu", seed=2, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    sizes = [CLIP_SIZES["hidden_size"], HIDDEN]
    layers = {"linear": [""], "mlp1x_gelu": ["0."], "mlp2x_gelu": ["0.", "2."], "mlp3x_gelu": ["0.", "2.", "4."]}[kind]
    tensors = {}
    for index, layer in enumerate(layers):
        columns = sizes[min(index, 1)]
        tensors[f"{layer}weight"] = (torch.randn(HIDDEN, columns, generator=generator) * 0.2).to(dtype)
        tensors[f"{layer}bias"] = (torch.randn(HIDDEN, generator=generator) * 0.2).to(dtype)
    return tensors


LLAVA_SETTINGS = {
    "mm_hidden_size": CLIP_SIZES["hidden_size"],
    "mm_projector_type": "mlp2x_gelu",
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
    "image_aspect_ratio": "pad",
    "tune_mm_mlp_adapter": False,
    "use_mm_proj": True,
    # As the published checkpoints have them; nothing reads these.
    "freeze_mm_mlp_adapter": False,
    "image_grid_pinpoints": None,
    "max_length": 4096,
    "mm_resampler_type": None,
    "pretraining_tp": 1,
    "unfreeze_mm_vision_tower": False,
}
FAMILIES = {
    "llava": ("model.", llama_config, llama_tensors, "LlavaLlamaForCausalLM", "llava"),
    "shellv": ("transformer.", codeshell_config, codeshell_tensors, "LlavaCodeShellForCausalLM", "llava_codeshell"),
}


def language_model(form, directory, container="safetensors", **changes):
    """The language model that a LLaVA-1.5 or Shell-V checkpoint starts from; returns config and tensors."""
    _, make_config, make_tensors, _, _ = FAMILIES[form]
    config = make_config(**changes)
    tensors = make_tensors(config)
    write_checkpoint(directory, config, tensors, container)
    return config, tensors


def llava_checkpoint(form, directory, container="safetensors", projector="mlp2x_gelu", text=None, **changes):
    """A whole checkpoint; returns its tensors."""
    prefix, make_config, make_tensors, architecture, model_type = FAMILIES[form]
    settings = {**LLAVA_SETTINGS, "mm_projector_type": projector}
    config = {**make_config(), **settings, "architectures": [architecture], "model_type": model_type, **changes}
    tensors = dict(text or make_tensors(make_config()))
    tensors |= {f"{prefix}mm_projector.{name}": t for name, t in projector_tensors(projector).items()}
    tensors |= {f"{prefix}vision_tower.vision_tower.vision_model.{n}": t for n, t in clip_tensors().items()}
    write_checkpoint(directory, config, tensors, container)
    return tensors


def clip_directory(directory):
    from transformers import CLIPVisionConfig

    config = CLIPVisionConfig(**CLIP_SIZES, num_attention_heads=1).to_dict()
    write_checkpoint(directory, config, {f"vision_model.{n}": t for n, t in clip_tensors().items()}, tokenizer=False)
    return directory


def write_checkpoint(directory, config, tensors, container="safetensors", tokenizer=True):
    """Write a checkpoint as one or two safetensors or pickled files, or in the pickle format before torch 1.6."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    if tokenizer:
        byte_tokenizer(directory)
    names = list(tensors)
    if container == "safetensors":
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    elif container in ("bin", "old bin"):
        torch.save(tensors, directory / "pytorch_model.bin", _use_new_zipfile_serialization=container == "bin")
    else:
        extension = {"safetensors shards": "safetensors", "bin shards": "bin"}[container]
        stem = "model" if extension == "safetensors" else "pytorch_model"
        weight_map = {}
        for part, chosen in enumerate((names[: len(names) // 2], names[len(names) // 2 :]), start=1):
            file = f"{stem}-0000{part}-of-00002.{extension}"
            shard = {name: tensors[name] for name in chosen}
            if extension == "bin":
                torch.save(shard, directory / file)
            else:
                save_file(shard, directory / file, metadata={"format": "pt"})
            weight_map |= dict.fromkeys(chosen, file)
        index = json.dumps({"metadata": {}, "weight_map": weight_map})
        (directory / f"{stem}.{extension}.index.json").write_text(index)


def byte_tokenizer(directory):
    """A tokenizer of `TOKENS` entries, none of them a template's marker or <image>."""
    from transformers import PreTrainedTokenizerFast

    full = byte_level(vocab_size=420)
    state = json.loads(full.backend_tokenizer.to_str())
    state["added_tokens"] = [token for token in state["added_tokens"] if token["id"] < 3]
    from tokenizers import Tokenizer

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)), eos_token="</s>", bos_token="</s>", unk_token="<unk>"
    )
    assert len(tokenizer) == TOKENS
    tokenizer.save_pretrained(directory)


def logits_of(model, input_ids):
    with torch.no_grad():
        return model(input_ids=input_ids).logits


def sentence_piece_tokenizer(directory):
    """LLaMA's tokenizer as the published LLaVA checkpoints have it: tokenizer.model, and no tokenizer.json."""
    from transformers.convert_slow_tokenizer import import_protobuf

    model = import_protobuf().ModelProto()
    controls = [("<unk>", 2), ("<s>", 3), ("</s>", 3)]
    letters = [(chr(code), 1) for code in range(33, 127)]
    words = [(text, 1) for text in ("▁", "do", "og", "▁a", "▁do", "▁dog")]
    for index, (piece, kind) in enumerate([*controls, *((f"<0x{b:02X}>", 6) for b in range(256)), *letters, *words]):
        model.pieces.add(piece=piece, score=-float(index), type=kind)
    model.trainer_spec.model_type = 2
    model.trainer_spec.byte_fallback = True
    model.normalizer_spec.name = "identity"
    model.normalizer_spec.add_dummy_prefix = True
    model.normalizer_spec.remove_extra_whitespaces = False
    for name in ("tokenizer.json", "special_tokens_map.json"):
        (directory / name).unlink(missing_ok=True)
    (directory / "tokenizer.model").write_bytes(model.SerializeToString())
    settings = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    settings |= {"pad_token": "<unk>", "add_bos_token": True, "legacy": False, "model_max_length": 2048}
    (directory / "tokenizer_config.json").write_text(json.dumps(settings))
    return len(model.pieces)
