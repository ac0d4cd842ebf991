"""How much memory a run takes, before it starts: counted, not measured.

The largest forward and backward pass of the run is made once with tensors that have shapes and no data, and every
tensor that is made counts while it lives. So what attention, adapters, autocast, checkpointing and the contrast keep is
what the real pass keeps, whatever the architecture. Weights, gradients and the optimizer's state come from the
parameters and the ZeRO stage.

Layers are alike, so one pass with one layer and one with two tell what the whole stack takes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import os
import weakref
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface

from shellv_core.data.loader import NO_IMAGE, PackedBatch
from shellv_core.data.packing import document_layout
from shellv_core.errors import ConfigError
from shellv_core.logs import get_logger
from shellv_core.training.attention import ATTENTION_NAME, Documents, documents_apart, documents_attention
from shellv_core.training.batches import Batch, batch_images, make_batch
from shellv_core.training.config import TrainingConfig
from shellv_core.training.examples import Answers, Examples, Ragged
from shellv_core.training.features import TOWER_BATCH, tower_features
from shellv_core.training.flops import without_data
from shellv_core.training.model import TrainingModel
from shellv_core.training.packed import PackedRow, make_row
from shellv_core.training.packed_feed import pack_sizes
from shellv_core.training.pairs import make_contrast, make_preference

logger = get_logger(__name__)
GIGA = 1e9
FLOAT32 = 4
#: Usable bytes of devices, as their drivers report them.
DEVICES = {"a100-40": 42.3e9, "a100-80": 85.0e9, "h100": 85.0e9, "h200": 150.0e9}
#: What a process takes on a GPU beside torch's tensors, and what torch's allocator takes beside them, of the pass.
CUDA_CONTEXT, CUDA_FRAGMENTS = 0.7e9, 0.05
#: DeepSpeed's default: elements that are sent together, and weights that stage 3 holds whole at a time.
ZERO_BUCKET, ZERO3_LIVE = 500_000_000, 1_000_000_000
#: Without data to look at: text tokens of a conversation in a pack, tokens of a caption.
TEXT_TOKENS, CAPTION_TOKENS = 256, 32
#: How far the estimate may be off; only beyond that is a run refused.
TOLERANCE = 0.15
#: Bytes per weight of linear layers in QLoRA, with their constants.
QUANTIZED_BYTES = {"nf4": 0.516, "int8": 1.0}
LAYERS_COUNTED = 2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on each device at the highest point of a run.

    Attributes:
        weights: of all parts, and buffers.
        gradients: as they are from the second of several passes on, and while they are averaged.
        optimizer: AdamW's two moments, under ZeRO the weights' float32 copies too.
        buffers: what DeepSpeed gathers and sends at a time.
        layers: of the pass, what the language model's layers keep, autocast's copies of weights included.
        logits: of the pass, what is between the layers and the loss.
        contrast: of the pass, what the objectives beside the generation loss run apart: captions and hallucinated
            captions in padded form (in a pack they are the layers'), and a preference's answers.
        vision: pictures' features, or the tower's pass where that is the highest point.
        overhead: of the allocator and the CUDA context.
    """

    weights: float
    gradients: float
    optimizer: float
    buffers: float
    layers: float
    logits: float
    contrast: float
    vision: float
    overhead: float

    @property
    def total(self) -> float:
        """All of them."""
        return sum(vars(self).values())

    def describe(self) -> str:
        """One line, in GB (10^9 bytes)."""
        parts = ", ".join(f"{name} {_gb(value)}" for name, value in vars(self).items() if value >= 0.005 * self.total)
        return f"{_gb(self.total)} GB ({parts})"


def estimate_memory(
    module: TrainingModel,
    config: TrainingConfig,
    batch: Batch | PackedRow,
    device_type: str = "cuda",
    num_devices: int = 1,
    zero_stage: int = 0,
    quantization: str | None = None,
) -> MemoryEstimate:
    """The memory that training takes on each device.

    Args:
        module: as it will be trained, adapters in place; its tensors may be on the meta device.
        batch: the largest; its tensors may be on the meta device too. See `largest_batch`.
        device_type: "cuda" or "cpu".
        zero_stage: 0 for DDP, or plain training on one device.
        quantization: count frozen linear layers as if they were quantized so ("nf4", "int8"); none that is so already.
    """
    state = _state(module, num_devices, zero_stage, quantization)
    parts = _pass_parts(module, config, batch, device_type, quantization is not None)
    dynamic = sum(parts.values())
    overhead = CUDA_CONTEXT + CUDA_FRAGMENTS * dynamic if device_type == "cuda" else 0.0
    return MemoryEstimate(**state, **parts, overhead=overhead)


def largest_batch(
    module: TrainingModel,
    config: TrainingConfig,
    examples: Examples | None = None,
    pack: tuple[int, int] | None = None,
    num_devices: int = 1,
) -> Batch | PackedRow:
    """The largest batch or pack that a device gets in a forward pass, without data.

    Args:
        examples: what is trained on in padded batches; without it, conversations of `config.max_length` with a picture
            each.
        pack: with packing, tokens of the largest pack and pictures in it; without it, as conversations usually have.
        num_devices: that share a step.
    """
    model = module.model
    image_tokens = int(model.config.image_seq_length)
    if config.packing:
        if pack is None:
            length = min(config.max_length, image_tokens + TEXT_TOKENS)
            tokens, _ = pack_sizes(np.full(config.global_batch_size, length), config)
            pack = tokens, max(tokens // length, 1)
        tokens, number = pack[0], max(pack[1], 1)
        examples = imagined_examples(module, [tokens // number] * number)
        return _imagined_pack(module, config, examples)
    rows = config.micro_batch_size or -(-config.global_batch_size // num_devices)
    if examples is None:
        examples = imagined_examples(module, [config.max_length] * rows)
    longest = np.argsort(-examples.input_ids.lengths, kind="stable")[:rows]
    count = len(batch_images(examples, longest))
    features = None
    if count:
        shape = (count, image_tokens, _tower_width(model))
        features = torch.empty(shape, dtype=_feature_dtype(module, config), device="meta")
    return make_batch(
        examples,
        longest,
        features,
        model.config.image_token_id,
        model.generation_config.pad_token_id or 0,
        num_hallucinated=module.hacl.num_hallucinated if module.heads is not None else None,
        truths=module.hacl.truth_weight > 0,
        preference=module.preference.weight > 0,
        loss_chunk=config.loss_chunk,
    )


def imagined_examples(module: TrainingModel, lengths: Sequence[int]) -> Examples:
    """Conversations of these lengths, each with a picture of its own, a caption and hallucinated captions."""
    model = module.model
    image_token, image_tokens = model.config.image_token_id, model.config.image_seq_length
    word = int(image_token == 0)
    input_ids, labels = [], []
    for length in lengths:
        ids = np.full(max(length, image_tokens + 2), word, dtype=np.int32)
        ids[1 : 1 + image_tokens] = image_token
        input_ids.append(ids)
        labels.append(np.where(np.arange(len(ids)) > image_tokens, ids, -100).astype(np.int32))
    count, slots = len(lengths), max(module.hacl.num_hallucinated, int(module.preference.weight > 0))
    texts = Ragged.of([np.full(CAPTION_TOKENS, word, dtype=np.int32)] * count)
    lies = Ragged.of([np.full(CAPTION_TOKENS, word, dtype=np.int32)] * count * slots)
    nothing = Ragged.of([np.zeros(0, dtype=np.int32)] * count * slots)
    prompt = np.full(image_tokens + CAPTION_TOKENS, word, dtype=np.int32)
    prompt[1 : 1 + image_tokens] = image_token
    number = np.arange(count)
    return Examples(
        input_ids=Ragged.of(input_ids),
        labels=Ragged.of(labels),
        image_index=number,
        captions=texts,
        caption_groups=number,
        hallucinated=lies,
        hallucinated_groups=count + np.arange(count * slots),
        hallucinated_offsets=np.arange(count + 1) * slots,
        hallucinated_types=np.zeros(count * slots, dtype=np.int64),
        truths=nothing,
        truth_groups=np.zeros(count * slots, dtype=np.int64),
        answers=Answers(prompt, texts, lies, nothing) if module.preference.weight else None,
    )


def check_memory(
    module: TrainingModel,
    config: TrainingConfig,
    examples: Examples | None = None,
    pack: tuple[int, int] | None = None,
    num_devices: int = 1,
    zero_stage: int = 0,
) -> MemoryEstimate:
    """Log what a run will take against what its device has.

    Args:
        examples, pack: see `largest_batch`.

    Raises:
        ConfigError: if it cannot fit, the estimate's tolerance granted, and `config.check_memory` is on.
    """
    device = module.model.device
    batch = largest_batch(module, config, examples, pack, num_devices)
    estimate = estimate_memory(module, config, batch, device.type, num_devices, zero_stage)
    capacity = device_memory(device)
    logger.info("memory: about %s of %s GB on %s", estimate.describe(), _gb(capacity), device)
    if estimate.total <= capacity:
        return estimate
    message = (
        f"training needs about {_gb(estimate.total)} GB on {device}, which has {_gb(capacity)} GB. Lower"
        " training.micro_batch_size (or training.pack_tokens with packing), set training.gradient_checkpointing=true,"
        " train adapters (lora), share states among more devices (training.engine=deepspeed, training.zero_stage), or"
        " see `shellv estimate`."
    )
    if config.check_memory and estimate.total > (1 + TOLERANCE) * capacity:
        raise ConfigError(f"{message} Set training.check_memory=false to try all the same.")
    logger.warning("%s", message)
    return estimate


def device_memory(device: torch.device) -> int:
    """Bytes that a process may use on `device`: all of a GPU, or the machine's or container's memory."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for name in ("memory.max", "memory/memory.limit_in_bytes"):
        with contextlib.suppress(OSError, ValueError):
            total = min(total, int((Path("/sys/fs/cgroup") / name).read_text()))
    return total


def _state(module: TrainingModel, num_devices: int, zero_stage: int, quantization: str | None) -> dict[str, float]:
    """Bytes of what outlasts a pass."""
    quantized = set()
    if quantization:
        layers = module.model.model.language_model.modules()
        quantized = {id(each.weight) for each in layers if isinstance(each, nn.Linear) and _frozen(each)}
    whole = shared = learning = 0.0
    for name, tensor in itertools.chain(module.named_parameters(), module.named_buffers()):
        size = tensor.numel() * float(tensor.element_size())
        if id(tensor) in quantized:
            size = tensor.numel() * QUANTIZED_BYTES[quantization or ""]
        # DeepSpeed leaves the tower, and buffers, whole.
        if isinstance(tensor, nn.Parameter) and ".vision_tower." not in name:
            shared += size
        else:
            whole += size
        learning += tensor.numel() * FLOAT32 * tensor.requires_grad
    elements = learning / FLOAT32
    if not zero_stage:
        gradients = learning * (2 if num_devices > 1 else 1)  # DDP's buckets are copies
        return {"weights": whole + shared, "gradients": gradients, "optimizer": 2 * learning, "buffers": 0.0}
    buffers = min(elements, ZERO_BUCKET) * FLOAT32
    if zero_stage == 3:
        buffers += min(shared / FLOAT32, ZERO3_LIVE) * FLOAT32
    return {
        "weights": whole + shared / (num_devices if zero_stage == 3 else 1),
        "gradients": learning / (num_devices if zero_stage >= 2 else 1),
        "optimizer": 3 * learning / num_devices,
        "buffers": buffers,
    }


def _pass_parts(
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
            if not isinstance(child, nn.Linear) or not _frozen(child):
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


def _imagined_pack(module: TrainingModel, config: TrainingConfig, examples: Examples) -> PackedRow:
    """A pack of all `examples`."""
    model, lengths = module.model, examples.input_ids.lengths
    order = range(len(examples))
    position_ids, borders = document_layout(lengths)
    ids = np.concatenate([examples.input_ids.at(each) for each in order]).astype(np.int64)
    labels = np.concatenate([examples.labels.at(each) for each in order]).astype(np.int64)
    with_image = examples.image_index != NO_IMAGE
    count = int(with_image.sum())
    pack = PackedBatch(
        input_ids=torch.from_numpy(ids),
        labels=torch.from_numpy(labels),
        position_ids=torch.from_numpy(position_ids),
        cu_seqlens=torch.from_numpy(borders),
        images=torch.zeros(count, 3, 0, 0, dtype=torch.uint8),
        image_index=torch.from_numpy(np.where(with_image, np.cumsum(with_image) - 1, NO_IMAGE)),
        captions=(None,) * count,
        hallucinated=((),) * count,
        keys=tuple(map(str, order)),
        documents=torch.arange(len(order)),
    )
    contrast = preference = None
    images = examples.image_index[with_image]
    if module.preference.weight and count:
        preference = make_preference(examples, images, model.config.image_token_id, 0, 0)
    if module.heads is not None and count:
        contrast = make_contrast(examples, images, 0, module.hacl.num_hallucinated, 0, module.hacl.truth_weight > 0)
    features = None
    if count:
        shape = (count, model.config.image_seq_length, _tower_width(model))
        features = torch.empty(shape, dtype=_feature_dtype(module, config), device="meta")
    return make_row(
        pack,
        features,
        model.config.image_token_id,
        module.eos_token_id or 0,
        contrast,
        config.loss_chunk,
        preference=preference,
    )


def _feature_dtype(module: TrainingModel, config: TrainingConfig) -> torch.dtype:
    if config.packing or not config.cache_features:
        return next(module.model.model.vision_tower.parameters()).dtype
    return torch.bfloat16 if config.precision == "bf16" else torch.float32


def _tower_width(model: Any) -> int:
    return int(model.model.multi_modal_projector.linear_1.in_features)


def _frozen(linear: nn.Linear) -> bool:
    return not linear.weight.requires_grad


def _gb(value: float) -> str:
    return f"{value / GIGA:.3g}" if value < 10 * GIGA else f"{value / GIGA:.1f}"
