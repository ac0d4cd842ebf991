"""Names of LLaVA-1.5's and Shell-V's weights, and those of stock ``LlavaForConditionalGeneration``.

Everything here maps names and tensors; it opens no file. Stock names are those of the module
(``model.language_model.layers.0...``). Sources: haotian-liu/LLaVA@c121f04 llava/model/llava_arch.py and builder.py,
WisdomShell/shell-v@4c5d282 shell_v/model/llava_arch.py, make_delta.py and apply_delta.py.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from shellv_core.errors import ModelError
from shellv_core.models.codeshell import codeshell_module, head_rows, starcoder2_modules
from shellv_core.models.weights import LazyTensor, Weights, in_memory


@dataclass(frozen=True)
class Family:
    """Upstream's code for one language model: where its weights hang, and what its checkpoints call themselves."""

    name: str
    prefix: str
    architecture: str
    model_type: str
    text_model_type: str
    template: str


FAMILIES = {
    family.name: family
    for family in (
        Family("llava", "model.", "LlavaLlamaForCausalLM", "llava_llama", "llama", "v1"),
        Family("shellv", "transformer.", "LlavaCodeShellForCausalLM", "llava_codeshell", "starcoder2", "shellv"),
    )
}
PROJECTOR, TOWER, TEXT = "model.multi_modal_projector.", "model.vision_tower.", "model.language_model."
#: Keys of mm_projector -> mm_projector_type. A longer chain has no counterpart in the stock class.
PROJECTOR_LAYOUTS = {
    frozenset({"weight", "bias"}): "linear",
    frozenset({"0.weight", "0.bias"}): "mlp1x_gelu",
    frozenset({"0.weight", "0.bias", "2.weight", "2.bias"}): "mlp2x_gelu",
}
PROJECTOR_MODULES = {"": "linear_1", "0.": "linear_1", "2.": "linear_2"}
#: Module prefixes in the files of a stock model -> in the module, as transformers and as vLLM have them.
STOCK_FILE_PREFIXES = {
    "language_model.model.": TEXT,
    "language_model.lm_head.": "lm_head.",
    "vision_tower.vision_model.": TOWER,
    "vision_tower.": TOWER,
    "multi_modal_projector.": PROJECTOR,
    "model.vision_tower.vision_model.": TOWER,
}
#: What training leaves in a checkpoint and no model needs: buffers that follow from the config, and HACL's heads.
LEFT_OUT = re.compile(
    r"model\.layers\.\d+\.self_attn\.rotary_emb\.inv_freq|.*vision_model\.embeddings\.position_ids"
    r"|(model|transformer)\.(vision_projector\.\w+|text_projector\.\w+|itc_temp|image_queue|text_queue|queue_ptr|ptr_queue)"
)
#: What a delta holds in full, as its base has none.
NOT_OF_BASE = re.compile(r"(model|transformer)\.(mm_projector|vision_tower)\.")
ADAPTER_KEY = re.compile(r"base_model\.model\.(.+)\.(lora_[AB])\.weight")


@dataclass(frozen=True)
class Parts:
    """A LLaVA checkpoint taken apart; the names are upstream's, without the part's prefix for projector and tower."""

    text: Weights
    projector: Weights
    tower: Weights
    left_out: tuple[str, ...]


def take_apart(weights: Weights, family: Family) -> Parts:
    """Sort upstream's `weights` by the part that they belong to; what is unknown stays with the language model."""
    parts = Parts({}, {}, {}, tuple(name for name in weights if LEFT_OUT.fullmatch(name)))
    projector = re.compile(re.escape(family.prefix) + r"mm_projector\.(.+)")
    tower = re.compile(re.escape(family.prefix) + r"vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?(.+)")
    for name, tensor in weights.items():
        if name in parts.left_out:
            continue
        for pattern, part in ((projector, parts.projector), (tower, parts.tower)):
            if match := pattern.fullmatch(name):
                part[match[1]] = tensor
                break
        else:
            parts.text[name] = tensor
    return parts


def put_together(parts: Parts, family: Family) -> Weights:
    """Undo `take_apart`; the left-out names aside."""
    return {
        **parts.text,
        **{f"{family.prefix}mm_projector.{name}": tensor for name, tensor in parts.projector.items()},
        **{f"{family.prefix}vision_tower.vision_tower.vision_model.{name}": t for name, t in parts.tower.items()},
    }


def stock_projector(projector: Weights, where: object) -> tuple[Weights, str]:
    """LLaVA's mm_projector as stock LLaVA's, and the type that its keys show.

    A single linear layer becomes the first of the stock class's two; the second is the identity, no activation between.

    Raises:
        ModelError: for another layout.
    """
    kind = PROJECTOR_LAYOUTS.get(frozenset(projector))
    if kind is None:
        raise ModelError(
            f"the projector in {where} has the keys {sorted(projector) or 'none'}; known are linear (weight, bias),"
            " mlp1x_gelu (0.*) and mlp2x_gelu (0.*, 2.*). Stock LlavaForConditionalGeneration has two linear layers, so"
            " that longer chains cannot be converted."
        )
    stock: Weights = {}
    for name, tensor in projector.items():
        module, _, part = name.rpartition(".")
        stock[f"{PROJECTOR_MODULES[module and module + '.']}.{part}"] = tensor
    if kind != "mlp2x_gelu":
        size, dtype = stock["linear_1.bias"].shape[0], stock["linear_1.bias"].dtype
        stock["linear_2.weight"] = LazyTensor((size, size), dtype, lambda: torch.eye(size, dtype=dtype))
        stock["linear_2.bias"] = LazyTensor((size,), dtype, lambda: torch.zeros(size, dtype=dtype))
    return stock, kind


def upstream_projector(stock: Weights, activation: str) -> tuple[Weights, str]:
    """Undo `stock_projector`; returns the weights and mm_projector_type.

    Raises:
        ModelError: if there is another activation than GELU, or none and yet two linear layers.
    """
    if activation == "gelu":
        names = {"linear_1": "0", "linear_2": "2"}
        return {
            f"{names[name.partition('.')[0]]}.{name.partition('.')[2]}": t for name, t in stock.items()
        }, "mlp2x_gelu"
    weight, bias = stock["linear_2.weight"].read(), stock["linear_2.bias"].read()
    if activation != "linear" or not torch.equal(weight, torch.eye(len(weight), dtype=weight.dtype)) or bias.any():
        raise ModelError(
            f"a projector with activation {activation!r} and a second linear layer that is not the identity has no"
            " counterpart in LLaVA; known are mlp2x_gelu and linear."
        )
    return {"weight": stock["linear_1.weight"], "bias": stock["linear_1.bias"]}, "linear"


def stock_module_names(weights: Weights) -> Weights:
    """Weights of a stock model's files under the names of its modules."""
    return _replace_prefixes(weights, STOCK_FILE_PREFIXES)


def stock_file_names(weights: Weights) -> Weights:
    """Weights under their modules' names as they stand in files; vLLM reads these too, for its native models."""
    prefixes: dict[str, str] = {}
    for file, module in STOCK_FILE_PREFIXES.items():
        prefixes.setdefault(module, file)
    return _replace_prefixes(weights, prefixes)


def text_module_names(weights: Weights) -> Weights:
    """Weights of a causal language model under the names that its modules have inside stock LLaVA."""
    return _replace_prefixes(weights, {"model.": TEXT})


def text_of_stock(weights: Weights) -> Weights:
    """The language model of stock LLaVA under the names of its own causal language model class."""
    names = {name: tensor for name, tensor in weights.items() if name.startswith((TEXT, "lm_head."))}
    return _replace_prefixes(names, {TEXT: "model."})


def part_of_stock(weights: Weights, prefix: str) -> Weights:
    """The weights below `prefix`, which their names lose."""
    return {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}


def stock_modules(module: str, family: Family) -> list[str]:
    """The stock modules that make up upstream's `module`; an unknown one stays as it is."""
    for source, target in PROJECTOR_MODULES.items():
        if module == f"{family.prefix}mm_projector.{source}".rstrip("."):
            return [PROJECTOR + target]
    names = starcoder2_modules(module) if family.name == "shellv" else [module]
    return [re.sub(r"^model\.", TEXT, name) for name in names]


def upstream_module(module: str, family: Family) -> str:
    """Upstream's module that holds the stock `module` of the language model."""
    name = "model." + module.removeprefix(TEXT)
    return codeshell_module(name) if family.name == "shellv" else name


Adapter = dict[str, tuple[torch.Tensor, torch.Tensor]]


def read_lora_pairs(tensors: Mapping[str, torch.Tensor], where: object) -> Adapter:
    """Module -> (A of (rank, in), B of (out, rank)) of PEFT's LoRA weights.

    Raises:
        ModelError: if a half is missing, or something other than LoRA's two matrices is there.
    """
    halves: dict[str, dict[str, torch.Tensor]] = {}
    unexpected = []
    for key, tensor in tensors.items():
        if match := ADAPTER_KEY.fullmatch(key):
            halves.setdefault(match[1], {})[match[2]] = tensor
        else:
            unexpected.append(key)
    alone = [module for module, pair in halves.items() if len(pair) == 1]
    if unexpected or alone or not halves:
        raise ModelError(
            f"the adapter in {where} is not plain LoRA: unexpected {unexpected[:5]}, without their other half"
            f" {alone[:5]}, {len(halves)} modules. Only lora_A and lora_B pairs can be converted."
        )
    for module, pair in halves.items():
        if pair["lora_A"].shape[0] != pair["lora_B"].shape[1]:
            raise ModelError(
                f"{module} in {where}: lora_A is {tuple(pair['lora_A'].shape)}, lora_B {tuple(pair['lora_B'].shape)};"
                " the rank must agree."
            )
    return {module: (pair["lora_A"], pair["lora_B"]) for module, pair in halves.items()}


def lora_tensors(adapter: Adapter) -> dict[str, torch.Tensor]:
    """Undo `read_lora_pairs`."""
    tensors = {}
    for module, (a, b) in adapter.items():
        tensors[f"base_model.model.{module}.lora_A.weight"] = a.contiguous()
        tensors[f"base_model.model.{module}.lora_B.weight"] = b.contiguous()
    return tensors


def stock_adapter(adapter: Adapter, family: Family, text_config: Any, rank: int) -> Adapter:
    """Upstream's adapter on stock modules. CodeShell's fused matrix becomes three, which share A.

    Args:
        rank: the adapter's r; a fused matrix of three times this rank that `upstream_adapter` made is undone.
    """
    converted: Adapter = {}
    for module, (a, b) in adapter.items():
        targets = stock_modules(module, family)
        if len(targets) == 1:
            converted[targets[0]] = (a, b)
            continue
        pieces = b.split(head_rows(text_config), dim=0)
        blocks = _blocks(a, pieces, rank) or [(a, piece) for piece in pieces]
        converted |= dict(zip(targets, blocks, strict=True))
    return converted


def upstream_adapter(adapter: Adapter, family: Family, text_config: Any, rank: int) -> Adapter:
    """A stock adapter on upstream's modules. Three different A become one of three times the rank, block by block.

    Raises:
        ModelError: if a module outside the language model is adapted.
    """
    outside = [module for module in adapter if not module.startswith(TEXT)]
    if outside:
        raise ModelError(f"the adapter changes {outside[0]}; only adapters on the language model have a LLaVA layout.")
    groups: dict[str, dict[str, tuple[torch.Tensor, torch.Tensor]]] = {}
    for module, pair in adapter.items():
        groups.setdefault(upstream_module(module, family), {})[module] = pair
    converted: Adapter = {}
    for module, pairs in groups.items():
        targets = stock_modules(module, family)
        if len(targets) == 1:
            converted[module] = next(iter(pairs.values()))
            continue
        some_a, some_b = next(iter(pairs.values()))
        absent = [(some_a, some_b.new_zeros(count, some_a.shape[0])) for count in head_rows(text_config)]
        converted[module] = _fused([pairs.get(t, none) for t, none in zip(targets, absent, strict=True)], rank)
    return converted


def adapter_scale(config: Mapping[str, Any], module: str) -> float:
    """The factor of B A in PEFT's `config`, for `module`."""
    rank = _pattern_value(config.get("rank_pattern"), module, config["r"])
    alpha = _pattern_value(config.get("alpha_pattern"), module, config["lora_alpha"])
    return float(alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank)


def adapted(weight: LazyTensor, a: torch.Tensor, b: torch.Tensor, scale: float) -> LazyTensor:
    """``weight + scale * b @ a``, computed in float32."""

    def read() -> torch.Tensor:
        return (weight.read().float() + scale * (b.float() @ a.float())).to(weight.dtype)

    return LazyTensor(weight.shape, weight.dtype, read)


def apply_delta(delta: Weights, base: Weights, where: object) -> Weights:
    """``base + delta`` where `base` has the name, `delta` itself elsewhere (the projector, added rows).

    Raises:
        ModelError: if the two do not belong together.
    """
    _check_delta(delta, base, where)
    return {name: _sum(tensor, base[name]) if name in base else tensor for name, tensor in delta.items()}


def make_delta(target: Weights, base: Weights, where: object) -> Weights:
    """What `apply_delta` adds to `base` to get `target`, bit for bit.

    Each difference has the narrowest type of its own, float32 and float64 from which `target` comes back exactly.

    Raises:
        ModelError: if the two do not belong together, or no type is exact.
    """
    _check_delta(target, base, where)
    deltas: Weights = {}
    for name, tensor in target.items():
        if name not in base:
            deltas[name] = tensor
            continue
        if tensor.dtype != base[name].dtype:
            raise ModelError(
                f"{name} is {tensor.dtype} in {where}, but {base[name].dtype} in the base; both must agree."
            )
        dtype = _exact_dtype(tensor.read(), base[name].read(), name)
        deltas[name] = _lazy_difference(tensor, base[name], dtype)
    return deltas


def averaged_rows(tensor: LazyTensor, count: int) -> LazyTensor:
    """`tensor` of (rows, hidden) with `count` more rows, each the mean of its rows; LLaVA's start for new tokens."""

    def read() -> torch.Tensor:
        values = tensor.read()
        mean = values.mean(dim=0, keepdim=True, dtype=torch.float32).to(values.dtype)
        return torch.cat([values, mean.expand(count, -1)])

    return LazyTensor((tensor.shape[0] + count, *tensor.shape[1:]), tensor.dtype, read)


def replaced_rows(tensor: LazyTensor, indices: Sequence[int], values: torch.Tensor | None) -> LazyTensor:
    """`tensor` with `values` (len(indices), hidden) at `indices`; None takes the mean of the other rows before them."""

    def read() -> torch.Tensor:
        changed = tensor.read().clone()
        if values is None:
            new = changed[: min(indices)].mean(dim=0, dtype=torch.float32).expand(len(indices), -1)
        else:
            new = values
        changed[list(indices)] = new.to(changed.dtype)
        return changed

    return LazyTensor(tensor.shape, tensor.dtype, read)


def _replace_prefixes(weights: Weights, prefixes: Mapping[str, str]) -> Weights:
    renamed: Weights = {}
    for name, tensor in weights.items():
        old = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
        renamed[prefixes[old] + name.removeprefix(old) if old else name] = tensor
    return renamed


def _blocks(
    a: torch.Tensor, pieces: Sequence[torch.Tensor], rank: int
) -> list[tuple[torch.Tensor, torch.Tensor]] | None:
    """The pairs from which `_fused` made a block diagonal; None where it did not."""
    if a.shape[0] != len(pieces) * rank:
        return None
    ranges = [slice(index * rank, (index + 1) * rank) for index in range(len(pieces))]
    for piece, own in zip(pieces, ranges, strict=True):
        outside = piece.clone()
        outside[:, own] = 0
        if outside.any():
            return None
    return [(a[own], piece[:, own]) for piece, own in zip(pieces, ranges, strict=True)]


def _fused(pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    if all(torch.equal(a, pairs[0][0]) for a, _ in pairs):
        return pairs[0][0], torch.cat([b for _, b in pairs])
    return torch.cat([a for a, _ in pairs]), torch.block_diag(*(b for _, b in pairs))


def _pattern_value(pattern: Mapping[str, float] | None, module: str, default: float) -> float:
    for key, value in (pattern or {}).items():
        if re.fullmatch(rf"(.*\.)?({key})", module):
            return value
    return default


def _check_delta(target: Weights, base: Weights, where: object) -> None:
    missing = [name for name in base if name not in target]
    strangers = [
        name for name in target if name not in base and not re.search(r"\.(mm_projector|vision_tower)\.", name)
    ]
    wrong = [
        f"{name} is {target[name].shape}, the base's {tensor.shape}"
        for name, tensor in base.items()
        if name in target and (target[name].shape[1:] != tensor.shape[1:] or target[name].shape[0] < tensor.shape[0])
    ]
    if missing or strangers or wrong:
        raise ModelError(
            f"{where} and its base do not belong together: {len(missing)} missing {missing[:5]}, {len(strangers)}"
            f" unexpected {strangers[:5]}, {len(wrong)} of a wrong shape {wrong[:5]}. Give the base model that the"
            " delta was made of."
        )


def _sum(delta: LazyTensor, base: LazyTensor) -> LazyTensor:
    return LazyTensor(delta.shape, base.dtype, lambda: _restored(delta.read(), base.read()))


def _lazy_difference(target: LazyTensor, base: LazyTensor, dtype: torch.dtype) -> LazyTensor:
    return LazyTensor(target.shape, dtype, lambda: _difference(target.read(), base.read(), dtype))


def _restored(delta: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    total = delta.clone()
    total[: len(base)] += base.to(delta.dtype)
    return total.to(base.dtype)


def _difference(target: torch.Tensor, base: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    delta = target.to(dtype, copy=True)
    delta[: len(base)] -= base.to(dtype)
    return delta


def _exact_dtype(target: torch.Tensor, base: torch.Tensor, name: str) -> torch.dtype:
    for dtype in dict.fromkeys((target.dtype, torch.float32, torch.float64)):
        if dtype.itemsize >= target.dtype.itemsize and torch.equal(
            _restored(_difference(target, base, dtype), base), target
        ):
            return dtype
    raise ModelError(f"{name}: no difference restores it exactly (not a number, or too far from the base).")


def tensor_weights(tensors: Mapping[str, torch.Tensor]) -> Weights:
    """Tensors in memory as `Weights`."""
    return {name: in_memory(tensor) for name, tensor in tensors.items()}
