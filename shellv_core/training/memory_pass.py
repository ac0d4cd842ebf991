"""What a forward and backward pass keeps: made once with tensors that have shapes and no data, and counted.

Layers are alike, so one pass with one layer and one with two tell what the whole stack takes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from shellv_core.training.attention import ATTENTION_NAME, Documents, documents_apart, documents_attention
from shellv_core.training.batches import Batch
from shellv_core.training.config import TrainingConfig
from shellv_core.training.features import TOWER_BATCH, tower_features
from shellv_core.training.flops import without_data
from shellv_core.training.model import TrainingModel
from shellv_core.training.packed import PackedRow

LAYERS_COUNTED = 2


def pass_parts(
    module: TrainingModel, config: TrainingConfig, batch: Batch | PackedRow, device_type: str, quantized: bool
) -> dict[str, float]:
    """Bytes of a forward and backward pass at its highest point."""
    layers: Any = module.model.model.language_model.layers
    counts = [*range(1, LAYERS_COUNTED + 1)] if len(layers) > LAYERS_COUNTED else [len(layers)]
    peaks = [_pass_peaks(module, config, batch, device_type, count, quantized) for count in counts]
    found, total = Counter[str](), 0
    for phase, live in peaks[-1].items():
        grown = sum(live.values())
        grown += (len(layers) - counts[-1]) * (grown - sum(peaks[0][phase].values()))
        if grown >= total:
            total, found = grown, live + Counter(layers=grown - sum(live.values()))
    images = 0 if batch.image_features is None else len(batch.image_features)
    tower = _tower_peak(module, images, config) if images and (config.packing or not config.cache_features) else 0.0
    return {
        "layers": float(found["layers"]),
        "logits": float(found["logits"]),
        "contrast": float(found["contrast"]),
        "vision": float(found["vision"] + max(tower - total, 0)),
    }


def _pass_peaks(
    module: TrainingModel,
    config: TrainingConfig,
    batch: Batch | PackedRow,
    device_type: str,
    num_layers: int,
    quantized: bool,
) -> dict[str, Counter[str]]:
    """Phase -> part -> bytes at its highest point, for a model of `num_layers`."""
    fake = _bare_module(module, num_layers, config.precision == "bf16" and quantized)
    with FakeTensorMode():
        _fake_tensors(fake)
        language_model = fake.model.model.language_model
        with contextlib.ExitStack() as stack:
            if isinstance(batch, PackedRow):
                stack.enter_context(_imagined_attention(device_type))
                stack.enter_context(documents_apart(language_model))
            else:
                eager = device_type == "cpu" and config.precision == "bf16"  # see PaddedFeed.attention
                language_model.set_attn_implementation("eager" if eager else "sdpa")
            if config.gradient_checkpointing:
                options = {"use_reentrant": False}
                language_model.activation_checkpointing_enable(activation_checkpointing_kwargs=options)
                language_model.disable_input_require_grads()
            tracker = stack.enter_context(_Tracker(fake))
            tracker.part = "vision"
            data = _fake_batch(batch)
            tracker.follow(language_model)
            with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
                output = fake(data)
            loss = output.generation_loss_sum
            if output.contrast is not None:
                loss = loss + output.contrast.objective(fake.hacl.truth_weight, fake.hacl.text_margin_weight)
            if output.preference is not None:
                preference = fake.preference
                loss = loss + output.preference.objective(preference.image_weight, preference.anchor_weight)
            loss.backward()
        return tracker.highest


def _tower_peak(module: TrainingModel, images: int, config: TrainingConfig) -> float:
    """Bytes of the vision tower's pass, its result included."""
    model = module.model
    vision: Any = model.config.vision_config
    size: int = vision.image_size
    at_once = images if config.packing else min(images, TOWER_BATCH)
    tower = without_data(model.model.vision_tower)
    shell: Any = copy.copy(model)
    shell._modules = {"model": nn.Module()}
    shell.model.vision_tower = tower
    with FakeTensorMode():
        _fake_tensors(tower)
        with _Tracker(tower) as tracker:
            tower_features(shell, torch.empty(at_once, 3, size, size))
    return float(max(sum(live.values()) for live in tracker.highest.values()))


class _Tracker(TorchDispatchMode):
    """Counts the bytes of tensors that are made within it and live; those of `module` are none of them.

    Attributes:
        part: what tensors made now belong to, and the phase.
        highest: phase -> part -> bytes, when all together were most in that phase.
    """

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.part, self.live = "layers", Counter[str]()
        self.highest: dict[str, Counter[str]] = {}
        self._most = Counter[str]()
        tensors = [*module.parameters(), *module.buffers()]
        tensors += [each.grad for each in module.parameters() if each.grad is not None]
        self._known: dict[int, Any] = {id(each.untyped_storage()): each.untyped_storage() for each in tensors}

    def follow(self, language_model: nn.Module) -> None:
        """Tell parts by the language model's passes: the first is of the batch itself, others are of the objectives."""
        passes = itertools.count()

        def before(*_: Any) -> None:
            self.part = "contrast" if next(passes) else "layers"

        def after(*_: Any) -> None:
            self.part = "logits" if self.part == "layers" else self.part

        language_model.register_forward_pre_hook(before)
        language_model.register_forward_hook(after)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for each in tree_leaves(result):
            if isinstance(each, torch.Tensor):
                self._count(each.untyped_storage())
        return result

    def _count(self, storage: Any) -> None:
        key, part, size = id(storage), self.part, storage.nbytes()
        if key in self._known:
            return

        def gone(_: Any) -> None:
            self._known.pop(key, None)
            self.live[part] -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live[part] += size
        if (total := sum(self.live.values())) > self._most[part]:
            self._most[part], self.highest[part] = total, Counter(self.live)


def _bare_module(module: TrainingModel, num_layers: int, bf16_base: bool) -> TrainingModel:
    """A copy without data, of its first layers, without the tower."""
    bare: TrainingModel = without_data(module)
    for model in (bare.model, bare.reference):
        if model is not None:
            language_model: Any = model.model.language_model
            language_model.layers = language_model.layers[:num_layers]
            _unquantize(language_model, bf16_base)
            model.model.vision_tower = nn.Identity()
    return bare.train()


def _fake_tensors(bare: nn.Module) -> None:
    """Give a module without data tensors of the current `FakeTensorMode`, on the CPU, and gradients."""
    made: dict[int, Any] = {}

    def fake(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in made:
            new: torch.Tensor = torch.empty(tensor.shape, dtype=tensor.dtype)
            if isinstance(tensor, nn.Parameter):
                new = nn.Parameter(new, tensor.requires_grad)
                if tensor.requires_grad:
                    new.grad = torch.zeros_like(new)
            made[id(tensor)] = new
        result: torch.Tensor = made[id(tensor)]
        return result

    # Keys are ids, so the old tensors stay until all are replaced.
    old = [*bare.parameters(), *bare.buffers()]
    for each in bare.modules():
        for held in (each._parameters, each._buffers):
            fakes: dict[str, Any] = {name: fake(tensor) for name, tensor in held.items() if tensor is not None}
            held.update(fakes)
    del old


def _unquantize(language_model: nn.Module, bf16: bool) -> None:
    """Plain frozen layers in place of quantized ones, real or imagined: a pass keeps none of their weights."""
    for parent in list(language_model.modules()):
        for name, child in list(parent.named_children()):
            if not isinstance(child, nn.Linear) or not is_frozen(child):
                continue
            packed = not child.weight.is_floating_point()
            if packed or bf16:
                dtype = torch.bfloat16 if bf16 or packed else child.weight.dtype
                plain = nn.Linear(
                    child.in_features, child.out_features, child.bias is not None, device="meta", dtype=dtype
                )
                setattr(parent, name, plain.requires_grad_(False))


def _fake_batch(value: Any) -> Any:
    """Tensors like those of a batch, made within the current modes."""
    if isinstance(value, torch.Tensor):
        return torch.empty(value.shape, dtype=value.dtype)
    if dataclasses.is_dataclass(value) and not isinstance(value, Documents | type):
        return dataclasses.replace(
            value, **{field.name: _fake_batch(getattr(value, field.name)) for field in dataclasses.fields(value)}
        )
    return value


@contextlib.contextmanager
def _imagined_attention(device_type: str) -> Iterator[None]:
    """`documents_attention` by shapes alone: what its kernels for the device read, make and keep."""

    def gather(states_NGW: torch.Tensor, count: int) -> torch.Tensor:
        return states_NGW[torch.empty(count, dtype=torch.int64)]

    def attention(
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        documents: Documents,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else query.dtype
        compute_dtype = torch.promote_types(dtype, torch.float32) if device_type == "cpu" else dtype
        query_NHW, key_NGW, value_NGW = (each[0].transpose(0, 1).to(compute_dtype) for each in (query, key, value))
        end, seen = documents.borders[-1], sum(stop - start for start, stop in documents.spans)
        seen += sum(documents.branch_lengths)
        queries, keys, values = (each[:end] for each in (query_NHW, key_NGW, value_NGW))
        if device_type == "cpu":
            queries, keys, values = (gather(each, end) for each in (queries, keys, values))
        with torch.autocast("cpu", enabled=False):
            parts = [_attend(queries, keys, values, causal=True)]
            if documents.spans:
                keys, values = gather(key_NGW, seen), gather(value_NGW, seen)
                parts.append(_attend(query_NHW[end:], keys, values, causal=False))
            result = torch.cat(parts) if len(parts) > 1 or device_type == "cpu" else parts[0]
            if device_type == "cpu":
                result = gather(result, len(result))
        return result[None].to(dtype), None

    AttentionInterface.register(ATTENTION_NAME, attention)
    try:
        yield
    finally:
        AttentionInterface.register(ATTENTION_NAME, documents_attention)


def _attend(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, causal: bool) -> torch.Tensor:
    query, key, value = (each.transpose(0, 1)[None] for each in (query, key, value))
    result: torch.Tensor = functional.scaled_dot_product_attention(query, key, value, is_causal=causal, enable_gqa=True)
    return result[0].transpose(0, 1)


def is_frozen(linear: nn.Linear) -> bool:
    """Whether training leaves its weight as it is."""
    return not linear.weight.requires_grad
