"""Training on a GPU: tokens a second, share of the peak, memory, for models of about 1 and 7 billion random weights.

    python -m tests.bench.gpu --output docs/gpu-figures.md

Needs torch, transformers, accelerate and peft, and of this library's own dependencies pydantic and orjson; no data and
nothing to download. Packs of random tokens with pictures of noise go through the code of a run: CLIP-L/336's shape as
the tower, packed attention, the chunked loss, AdamW, bfloat16. Counted are useful operations only (see
shellv_core.training.flops). Without a GPU it says so and exits with 0.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NEEDED = ("torch", "transformers", "accelerate", "peft", "pydantic", "orjson")
COLUMNS = ("model", "learns", "pass", "tokens/s", "MFU", "peak, GB", "seconds a step", "useful tokens")
TITLE = "# Figures of training on a GPU\n\nWritten by `python -m tests.bench.gpu`.\n"
#: name -> (architecture, hidden, intermediate, layers, heads, key heads, vocabulary)
SHAPES: dict[str, tuple[str, int, int, int, int, int, int]] = {
    "LLaMA, 1.1 B": ("llama", 2048, 5632, 22, 32, 4, 32000),
    "LLaMA, 7 B": ("llama", 4096, 11008, 32, 32, 32, 32000),
    "Starcoder2, Shell-7B": ("starcoder2", 4096, 16384, 42, 32, 8, 70144),
}
TINY: dict[str, tuple[str, int, int, int, int, int, int]] = {"tiny": ("llama", 64, 128, 2, 2, 1, 256)}
LEARNS = ("projector", "LoRA", "all")
IMAGE_TOKENS, TINY_IMAGE_TOKENS = 576, 4


def build(shape: tuple[str, int, int, int, int, int, int], learns: str, tiny: bool, device: Any) -> Any:
    """A `TrainingModel` with random weights; frozen ones in bfloat16 on a GPU, others in float32."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        CONFIG_MAPPING,
        CLIPVisionConfig,
        GenerationConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    from shellv_core.models.hacl import HaclHeads
    from shellv_core.training.config import HaclConfig
    from shellv_core.training.model import TrainingModel

    kind, hidden, intermediate, layers, heads, key_heads, vocabulary = shape
    text = CONFIG_MAPPING[kind](
        hidden_size=hidden, intermediate_size=intermediate, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=key_heads, vocab_size=vocabulary, max_position_embeddings=16384, bos_token_id=2,
        eos_token_id=2,
    )  # fmt: skip
    sizes = (64, 128, 2, 2, 28) if tiny else (1024, 4096, 24, 16, 336)
    vision = CLIPVisionConfig(
        hidden_size=sizes[0], intermediate_size=sizes[1], num_hidden_layers=sizes[2], num_attention_heads=sizes[3],
        image_size=sizes[4], patch_size=14,
    )  # fmt: skip
    config = LlavaConfig(
        vision_config=vision, text_config=text, image_token_index=3,
        image_seq_length=TINY_IMAGE_TOKENS if tiny else IMAGE_TOKENS,
    )  # fmt: skip
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float32 if learns == "all" or tiny else torch.bfloat16)
    try:
        with torch.device(device):
            model = LlavaForConditionalGeneration(config)
    finally:
        torch.set_default_dtype(torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=2, pad_token_id=0)
    module = TrainingModel(model, HaclHeads(hidden).to(device), HaclConfig(weight=1.0))
    module.requires_grad_(learns == "all")
    model.model.vision_tower.requires_grad_(False)
    module.heads.requires_grad_(True)
    model.model.multi_modal_projector.float().requires_grad_(True)
    if learns == "LoRA":
        names = {name.rpartition(".")[2] for name, each in model.model.language_model.named_modules()
                 if isinstance(each, torch.nn.Linear)}  # fmt: skip
        targets = rf".*\.language_model\..*\.({'|'.join(sorted(names))})"
        get_peft_model(model, LoraConfig(r=8 if tiny else 128, lora_alpha=256, target_modules=targets))
        model.model.multi_modal_projector.requires_grad_(True)
    return module.train()


def steps(module: Any, packs: Sequence[Any], contrasts: Sequence[Any], warm: int) -> dict[str, float]:
    """Figures of an optimizer step for each pack, those of the first `warm` left out."""
    import torch

    from shellv_core.training.attention import documents_apart
    from shellv_core.training.features import tower_features
    from shellv_core.training.flops import FlopFormula
    from shellv_core.training.meter import Meter
    from shellv_core.training.packed import make_row

    device = module.model.device
    optimizer = torch.optim.AdamW([each for each in module.parameters() if each.requires_grad], lr=1e-5, fused=True)
    size = module.model.config.vision_config.image_size
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    meter = Meter(device, FlopFormula(module, tower_runs=True))
    with documents_apart(module.model.model.language_model):
        for number, (pack, contrast) in enumerate(zip(packs, contrasts, strict=True)):
            if number == warm:
                _wait(device)
                meter.start, meter.samples, meter.tokens, meter.slots, meter.flops = time.monotonic(), 0, 0, 0, 0
            with torch.autocast(device.type, torch.bfloat16):
                features = tower_features(module.model, torch.randn(len(pack.images), 3, size, size, device=device))
                row = make_row(pack, features, 3, 2, contrast)
                output = module(row.to(device))
            loss = output.generation_loss_sum / max(len(row.label_ids), 1)
            if output.contrast is not None:
                loss = loss + output.contrast.objective(0.5, 0.0)
            loss.backward()
            torch.nn.utils.clip_grad_norm_([each for each in module.parameters() if each.grad is not None], 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            meter.count(*meter.counts(row))
    _wait(device)
    seconds = time.monotonic() - meter.start
    return {**meter.rates(None), "seconds": seconds / (len(packs) - warm)}


def _wait(device: Any) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure(name: str, shape: Any, learns: str, options: argparse.Namespace, device: Any) -> list[str]:
    """Table rows of one model: packed steps without and with HACL, and packs as long as length-grouped batches fill."""
    from tests.bench.hacl_step import random_contrast
    from tests.bench.models import random_pack

    module = build(shape, learns, options.tiny, device)
    image, text = (TINY_IMAGE_TOKENS, 8) if options.tiny else (IMAGE_TOKENS, 264)
    documents = max(options.pack_tokens // (image + text), 1)
    total = options.steps + options.warm
    packs = [
        random_pack([text] * documents, [True] * documents, image, shape[6], 0.5, seed=seed) for seed in range(total)
    ]
    contrasts = [random_contrast([15] * documents, shape[6], seed) for seed in range(total)]
    rows, plain = [], 0.0
    for kind, given in (("packed", [None] * total), ("packed, HACL", contrasts)):
        found = steps(module, packs, given, options.warm)
        plain = plain or found["seconds"]
        mfu = f"{found['mfu']:.3f}" if "mfu" in found else "unknown"
        step = f"{found['seconds']:.3f}" + (f" ({found['seconds'] / plain:.2f} x plain)" if given[0] else "")
        rows.append(
            f"| {name} | {learns} | {kind} | {found['tokens_per_second']:.0f} | {mfu} | {found['peak_memory_gb']:.1f}"
            f" | {step} | {found['useful_token_share']:.2f} |"
        )
    return rows


def packing_line() -> str:
    """Useful tokens of packs against length-grouped padded batches, of LLaVA's modelled lengths."""
    from tests.bench.packing import length_grouped_batches, llava_lengths, padded_share

    lengths, has_image = llava_lengths(0, 20_000)
    share = padded_share(lengths, length_grouped_batches(lengths, has_image, 16, 8, 0))
    return (
        f"Length-grouped padded batches of 16 hold {share:.2f} useful tokens, packs 0.95 and more: see data-figures.md."
    )


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and write; returns 0."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, help="Markdown file to write as well")
    parser.add_argument("--models", nargs="*", help=f"of: {', '.join(SHAPES)}")
    parser.add_argument("--learns", nargs="*", default=LEARNS, choices=LEARNS)
    parser.add_argument("--pack-tokens", type=int, default=8192)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warm", type=int, default=3, help="steps before, that do not count")
    parser.add_argument("--device", default="cuda", help=argparse.SUPPRESS)
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    missing = []
    for name in NEEDED:
        try:
            importlib.import_module(name)
        except ImportError:
            missing.append(name)
    if missing:
        print(f"not measured: {', '.join(missing)} not installed (pip install {' '.join(missing)}).")
        return 0
    import torch

    if options.device == "cuda" and not torch.cuda.is_available():
        print("not measured: there is no GPU here.")
        return 0
    device = torch.device(options.device)
    called = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    lines = [
        f"## {called}, {datetime.date.today()}\n",
        f"torch {torch.__version__}, packs of {options.pack_tokens} tokens, {options.steps} steps.\n",
        f"| {' | '.join(COLUMNS)} |",
        "|---" * len(COLUMNS) + "|",
    ]
    shapes = TINY if options.tiny else SHAPES
    for name, shape in shapes.items():
        if options.models and name not in options.models:
            continue
        for learns in options.learns:
            try:
                lines += measure(name, shape, learns, options, device)
            except torch.OutOfMemoryError:
                lines.append(f"| {name} | {learns} | does not fit" + " |" * (len(COLUMNS) - 2))
            if device.type == "cuda":
                torch.cuda.empty_cache()
            print(lines[-1], flush=True)
    if not options.tiny:
        with contextlib.suppress(ImportError):  # packing's plan is of the data code
            lines.append(f"\n{packing_line()}")
    text = "\n".join([TITLE, *lines, ""])
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
