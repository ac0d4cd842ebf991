"""CodeShell and Shell are Starcoder2 under other names: the same weights and settings, both ways and without loss.

CodeShell keeps queries, keys and values in one matrix ``c_attn`` of shape (hidden + 2 * groups * head_size, hidden),
one below the other; Starcoder2 keeps three. All else is names. Sources: WisdomShell/codeshell@d86d64c
model/modeling_codeshell.py, WisdomShell/shell-v@4c5d282 shell_v/model/language_model/configuration_codeshell.py.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from transformers import Starcoder2Config

from shellv_core.errors import ModelError
from shellv_core.models.weights import Weights, joined, require, rows, without

#: CodeShell's module -> Starcoder2's, outside the layers and in each layer.
OUTER_MODULES = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
LAYER_MODULES = {
    "ln_1": "input_layernorm",
    "attn.c_proj": "self_attn.o_proj",
    "ln_2": "post_attention_layernorm",
    "mlp.c_fc": "mlp.c_fc",
    "mlp.c_proj": "mlp.c_proj",
}
FUSED_MODULE = "attn.c_attn"
SPLIT_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
LAYER = re.compile(r"transformer\.h\.(\d+)\.(.+)")
STARCODER2_LAYER = re.compile(r"model\.layers\.(\d+)\.(.+)")
#: Buffers that follow from the settings, and Shell-V's second name of the word embeddings.
DERIVED = re.compile(r"transformer\.h\.\d+\.attn\.rotary_emb\.(inv_freq|cos_cached|sin_cached)")
DUPLICATE_EMBEDDINGS = "transformer.embed_tokens.weight"
#: CodeShell's setting -> Starcoder2's, and CodeShell's default.
SETTINGS: dict[str, tuple[str, Any]] = {
    "vocab_size": ("vocab_size", 70144),
    "n_positions": ("max_position_embeddings", 8192),
    "n_embd": ("hidden_size", 4096),
    "n_layer": ("num_hidden_layers", 42),
    "n_head": ("num_attention_heads", 32),
    "activation_function": ("hidden_act", "gelu_pytorch_tanh"),
    "resid_pdrop": ("residual_dropout", 0.1),
    "embd_pdrop": ("embedding_dropout", 0.1),
    "attn_pdrop": ("attention_dropout", 0.1),
    "layer_norm_epsilon": ("norm_epsilon", 1e-5),
    "initializer_range": ("initializer_range", 0.02),
    "use_cache": ("use_cache", True),
    "bos_token_id": ("bos_token_id", 70000),
    "eos_token_id": ("eos_token_id", 70000),
}
ROPE_THETA = 10000.0
SCALINGS = ("linear", "dynamic")


def is_codeshell_config(config: Mapping[str, Any]) -> bool:
    """Whether a config.json describes a CodeShell model (Shell included), with or without vision."""
    architectures = config.get("architectures") or []
    return config.get("model_type") in ("codeshell", "kclgpt", "llava_codeshell") or any(
        name in ("CodeShellForCausalLM", "LlavaCodeShellForCausalLM") for name in architectures
    )


def starcoder2_config(config: Mapping[str, Any], tied: bool = False) -> Starcoder2Config:
    """Starcoder2's settings for CodeShell's `config`, the content of its config.json.

    Args:
        tied: the word embeddings are the output matrix as well.

    Raises:
        ModelError: for learned positions, an unknown rope scaling, or quantized weights, which have no counterpart.
    """
    positions = config.get("position_embedding_type", "learned_absolute")
    if positions != "rope":
        raise ModelError(
            f"position_embedding_type={positions!r} has no counterpart in Starcoder2; only 'rope' (as CodeShell-7B and"
            " Shell-7B have it) can be converted."
        )
    if config.get("quantization_config"):
        raise ModelError("the checkpoint is quantized (quantization_config); convert the unquantized one.")
    values = {name: config.get(source, default) for source, (name, default) in SETTINGS.items()}
    grouped = config.get("group_query_attention", True)
    heads = values["num_attention_heads"]
    num_groups = config.get("num_query_groups", 1) if grouped else heads
    if values["hidden_size"] % heads or heads % num_groups:
        raise ModelError(
            f"n_embd={values['hidden_size']}, n_head={heads}, num_query_groups={num_groups} do not divide one another."
        )
    inner = config.get("n_inner")
    return Starcoder2Config(
        **values,
        intermediate_size=4 * values["hidden_size"] if inner is None else inner,
        num_key_value_heads=num_groups,
        pad_token_id=config.get("pad_token_id", values["eos_token_id"]),
        rope_parameters=_rope_parameters(config.get("rope_scaling")),
        sliding_window=None,
        use_bias=True,
        tie_word_embeddings=tied,
        architectures=["Starcoder2ForCausalLM"],
    )


def codeshell_config(config: Starcoder2Config) -> dict[str, Any]:
    """The content of CodeShell's config.json for Starcoder2's settings.

    Raises:
        ModelError: if `config` asks for what CodeShell does not have.
    """
    rope = dict(config.rope_parameters or {})
    scaling = rope.get("rope_type", "default")
    theta = rope.get("rope_theta", ROPE_THETA)
    checks = (
        (f"use_bias={config.use_bias}", config.use_bias),
        (f"sliding_window={config.sliding_window}", config.sliding_window is None),
        (f"rope_theta={theta:g}", theta == ROPE_THETA),
        (f"rope_type={scaling!r}", scaling in ("default", *SCALINGS)),
    )
    faults = [setting for setting, is_known in checks if not is_known]
    if faults:
        raise ModelError(f"CodeShell has no counterpart for {', '.join(faults)}; only its own variants go back.")
    return {
        "architectures": ["CodeShellForCausalLM"],
        "model_type": "codeshell",
        **{source: getattr(config, name) for source, (name, _) in SETTINGS.items()},
        "pad_token_id": config.pad_token_id,
        "n_inner": config.intermediate_size,
        "group_query_attention": True,
        "num_query_groups": config.num_key_value_heads,
        "position_embedding_type": "rope",
        "rope_scaling": None if scaling == "default" else {"type": scaling, "factor": rope["factor"]},
        "tie_word_embeddings": config.tie_word_embeddings,
        "torch_dtype": str(config.dtype).removeprefix("torch.") if config.dtype else "float32",
    }


def head_rows(config: Starcoder2Config) -> tuple[int, int, int]:
    """Rows of queries, keys and values in ``c_attn``."""
    head_size = config.hidden_size // config.num_attention_heads
    return (config.hidden_size, config.num_key_value_heads * head_size, config.num_key_value_heads * head_size)


def to_starcoder2(config: Mapping[str, Any], weights: Weights, where: object) -> tuple[Starcoder2Config, Weights]:
    """CodeShell's config.json and `weights` as those of ``Starcoder2ForCausalLM``.

    Without ``lm_head.weight`` the word embeddings serve as output matrix, unless the config says otherwise.

    Raises:
        ModelError: see `starcoder2_config` and `starcoder2_weights`.
    """
    tied = "lm_head.weight" not in weights and config.get("tie_word_embeddings", True)
    converted = starcoder2_config(config, tied)
    return converted, starcoder2_weights(weights, converted, where)


def starcoder2_weights(weights: Weights, config: Starcoder2Config, where: object) -> Weights:
    """CodeShell's `weights` under the names of ``Starcoder2ForCausalLM``, in their order.

    Raises:
        ModelError: listing keys that are missing, unexpected or of a wrong shape, or buffers and duplicates that
            contradict the weights.
    """
    kept = _without_derived(weights, config, where)
    require(kept, expected_weights(config), where)
    converted: Weights = {}
    for name, tensor in kept.items():
        module, _, part = name.rpartition(".")
        targets = starcoder2_modules(module)
        if len(targets) == 1:
            converted[f"{targets[0]}.{part}"] = tensor
            continue
        start = 0
        for target, count in zip(targets, head_rows(config), strict=True):
            converted[f"{target}.{part}"] = rows(tensor, start, start + count)
            start += count
    return converted


def codeshell_weights(weights: Weights, config: Starcoder2Config) -> Weights:
    """The weights of ``Starcoder2ForCausalLM`` under CodeShell's names; undoes `starcoder2_weights`."""
    converted: Weights = {}
    for name in weights:
        module, _, part = name.rpartition(".")
        target = codeshell_module(module)
        if f"{target}.{part}" not in converted:
            sources = [f"{source}.{part}" for source in starcoder2_modules(target)]
            converted[f"{target}.{part}"] = (
                weights[name] if len(sources) == 1 else joined([weights[source] for source in sources])
            )
    return converted


def starcoder2_modules(module: str) -> list[str]:
    """Starcoder2's module, or its query, key and value modules, for CodeShell's; unknown ones stay as they are."""
    match = LAYER.fullmatch(module)
    if match is None:
        return [OUTER_MODULES.get(module, module)]
    layer, inner = match.groups()
    if inner == FUSED_MODULE:
        return [f"model.layers.{layer}.{name}" for name in SPLIT_MODULES]
    return [f"model.layers.{layer}.{LAYER_MODULES[inner]}" if inner in LAYER_MODULES else module]


def codeshell_module(module: str) -> str:
    """CodeShell's module for Starcoder2's; unknown ones stay as they are."""
    match = STARCODER2_LAYER.fullmatch(module)
    if match is None:
        return {target: source for source, target in OUTER_MODULES.items()}.get(module, module)
    layer, inner = match.groups()
    names = {target: source for source, target in LAYER_MODULES.items()} | dict.fromkeys(SPLIT_MODULES, FUSED_MODULE)
    return f"transformer.h.{layer}.{names[inner]}" if inner in names else module


def expected_weights(config: Starcoder2Config) -> dict[str, tuple[int, ...]]:
    """Names and shapes of CodeShell's weights."""
    hidden, inner, fused = config.hidden_size, config.intermediate_size, sum(head_rows(config))
    shapes: dict[str, tuple[int, ...]] = {"transformer.wte.weight": (config.vocab_size, hidden)}
    for layer in range(config.num_hidden_layers):
        for module, shape in {
            "ln_1": (hidden,),
            FUSED_MODULE: (fused, hidden),
            "attn.c_proj": (hidden, hidden),
            "ln_2": (hidden,),
            "mlp.c_fc": (inner, hidden),
            "mlp.c_proj": (hidden, inner),
        }.items():
            shapes[f"transformer.h.{layer}.{module}.weight"] = shape
            shapes[f"transformer.h.{layer}.{module}.bias"] = shape[:1]
    shapes |= {"transformer.ln_f.weight": (hidden,), "transformer.ln_f.bias": (hidden,)}
    return shapes if config.tie_word_embeddings else {**shapes, "lm_head.weight": (config.vocab_size, hidden)}


def _rope_parameters(scaling: Mapping[str, Any] | None) -> dict[str, Any]:
    if scaling is None:
        return {"rope_type": "default", "rope_theta": ROPE_THETA}
    kind = scaling.get("type", scaling.get("rope_type"))
    if kind not in SCALINGS or not isinstance(scaling.get("factor"), int | float):
        raise ModelError(
            f"rope_scaling={dict(scaling)!r}: a type of {' or '.join(SCALINGS)} with a number as factor is expected."
        )
    return {"rope_type": kind, "factor": float(scaling["factor"]), "rope_theta": ROPE_THETA}


def _without_derived(weights: Weights, config: Starcoder2Config, where: object) -> Weights:
    derived = [name for name in weights if DERIVED.fullmatch(name)]
    # Dynamic scaling overwrites the frequencies at run time, so a checkpoint may hold any.
    if (config.rope_parameters or {}).get("rope_type") != "dynamic":
        for name in derived:
            if name.endswith("inv_freq"):
                _check_frequencies(weights[name].read(), config, f"{name} in {where}")
    if DUPLICATE_EMBEDDINGS in weights and "transformer.wte.weight" in weights:
        if not torch.equal(weights[DUPLICATE_EMBEDDINGS].read(), weights["transformer.wte.weight"].read()):
            raise ModelError(
                f"{DUPLICATE_EMBEDDINGS} and transformer.wte.weight in {where} differ, though they name one matrix;"
                " it cannot be said which is meant."
            )
        derived.append(DUPLICATE_EMBEDDINGS)
    return without(weights, derived)


def _check_frequencies(frequencies: torch.Tensor, config: Starcoder2Config, where: str) -> None:
    size = config.hidden_size // config.num_attention_heads
    expected = ROPE_THETA ** -(torch.arange(0, size, 2, dtype=torch.float32) / size)
    # Half precision keeps 3 digits.
    if frequencies.shape != expected.shape or not torch.allclose(frequencies.float(), expected, rtol=0.01, atol=1e-4):
        raise ModelError(f"{where} are not the frequencies of base {ROPE_THETA:g}, the only ones that CodeShell has.")
