"""The memory estimate against the measured peak: epochs of nano's size on this CPU.

    python -m tests.bench.memory            runs of nano's size, measured
    python -m tests.bench.memory seven      Shell-7B, estimated for GPUs

Both go into docs/training.md, between their marks.

Measured is what the process's resident memory rises over its level at the start of training (the kernel's own mark,
reset there), so gradients, the optimizer's state and the passes; the weights are there before. The allocator gives
every block above 64 KiB back at once, and oneDNN keeps no kernels of shapes that are gone (packs have a new shape each,
and its kernels grow by some 10 MB a step), by environment variables that the program sets before it starts anew.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from shellv_core.data.samples import Sample
from shellv_core.training.config import HaclConfig, TrainingConfig

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "0",
    "OMP_NUM_THREADS": "1",
    "LRU_CACHE_CAPACITY": "1",
    "ONEDNN_PRIMITIVE_CACHE_CAPACITY": "1",
}
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "training.md"
NUM_SAMPLES = 96
BOTH = ("projector", "language_model")
COMMON = TrainingConfig(trainable=BOTH, max_length=320, precision="bf16", global_batch_size=16)
HACL, NO_HACL = HaclConfig(weight=0.1), HaclConfig()


@dataclasses.dataclass(frozen=True)
class Case:
    """A run to measure."""

    name: str
    training: TrainingConfig
    lora: bool = False
    hacl: HaclConfig = NO_HACL


def case(name: str, lora: bool = False, hacl: HaclConfig = NO_HACL, **training: object) -> Case:
    """A case that differs from the common settings so."""
    return Case(name, TrainingConfig(**{**COMMON.model_dump(), **training}), lora, hacl)


CASES = [
    case("full, padded"),
    case("LoRA and HACL, padded", lora=True, hacl=HACL),
    case("full and HACL, packed", hacl=HACL, packing=True, pack_tokens=4096),
    case("full, padded, float32, batch of 48", precision="fp32", global_batch_size=48),
]


def samples() -> list[Sample]:
    """Samples whose conversations are of many lengths, up to what is cut."""
    from tests.training.tiny import tiny_samples

    generator = np.random.default_rng(0)
    result = []
    for sample in tiny_samples(NUM_SAMPLES, with_text_only=False):
        turns = [*sample.conversations, *sample.conversations[2:] * int(generator.integers(1, 30))]
        result.append(dataclasses.replace(sample, conversations=turns))
    return result


def measure(cases: list[Case], folder: Path) -> Iterator[tuple[Case, float, float]]:
    """Estimated and measured bytes of each case, without the weights."""
    import torch

    from shellv_core.models.compose import build_model
    from shellv_core.models.config import LoraConfig
    from shellv_core.models.hacl import HaclHeads
    from shellv_core.models.lora import add_lora
    from shellv_core.stages.presets import nano
    from shellv_core.storage import InputDirectory
    from shellv_core.training.fit import TrainingData, _load, tokenizer_texts
    from shellv_core.training.loop import set_trainable, train, train_from
    from shellv_core.training.memory import estimate_memory
    from shellv_core.training.memory_batches import largest_batch
    from shellv_core.training.model import TrainingModel
    from shellv_core.training.packed_feed import packed_feed
    from tests.data.shard_folder import shard_folder

    torch.set_num_threads(1)
    shards = shard_folder((folder / "data").as_uri(), folder / "work", {"train": samples()}, samples_per_shard=32)
    data = TrainingData.of(InputDirectory(shards.uri), "train")
    settings = nano().pretrain_projector.model
    tower = settings.vision_tower.model_copy(update={"pretrained": None, "standardize": False})
    settings = settings.model_copy(update={"vision_tower": tower})
    for number, each in enumerate(cases):
        config = each.training
        model, processor = build_model(settings, list(tokenizer_texts(data.read())))
        heads = HaclHeads(model.config.text_config.hidden_size) if each.hacl.weight else None
        module = TrainingModel(model, heads, each.hacl)
        set_trainable(module, config)
        if each.lora:
            add_lora(model, LoraConfig(r=32, alpha=64))

        def run(module, config, name, number=number, processor=processor):
            directory = folder / f"{number}-{name}"
            nothing = lambda metrics, step: None  # noqa: E731
            if config.packing:
                with packed_feed(module, processor, data.source, "train", config, 0) as feed:
                    batch = largest_batch(module, config, pack=feed.largest_pack())
                    before = start()
                    train_from(feed, module, config, 0, directory, nothing)
                    return batch, peak() - before
            examples, features = _load(module, processor, data, config, directory)
            batch = largest_batch(module, config, examples)
            before = start()
            train(module, examples, features, config, 0, directory, nothing)
            return batch, peak() - before

        # Once before, so that libraries are loaded and their code is there.
        small = {"max_steps": 1, "global_batch_size": 2}
        run(copy.deepcopy(module), config.model_copy(update=small), "warm")
        batch, measured = run(module, config, "run")
        estimate = estimate_memory(module, config, batch, "cpu")
        yield each, estimate.total - estimate.weights, measured


def start() -> int:
    """Reset the kernel's mark of the highest resident memory; returns the present one in bytes."""
    import gc

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmRSS")


def peak() -> int:
    """The highest resident memory since `start`, in bytes."""
    return _status("VmHWM")


def _status(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


#: Stage, settings, devices, ZeRO stage; of the preset shellv-7b, every conversation as long as they may be.
SEVEN = {
    "stage 1, micro batch 4": ("pretrain_projector", ["training.micro_batch_size=4"], 8, 0),
    "LoRA, micro batch 4": ("finetune", ["training.micro_batch_size=4"], 8, 0),
    "LoRA, packs of 4096": ("finetune", ["training.packing=true", "training.pack_tokens=4096"], 8, 0),
    "QLoRA (nf4), micro batch 4": ("finetune", ["training.micro_batch_size=4", "lora.quantization=nf4"], 8, 0),
    "full, ZeRO-2, packs of 4096": (
        "finetune", ["lora=null", "training.packing=true", "training.pack_tokens=4096"], 8, 2,
    ),
    "full, ZeRO-3, packs of 4096": (
        "finetune", ["lora=null", "training.packing=true", "training.pack_tokens=4096"], 8, 3,
    ),
}  # fmt: skip


def seven() -> Iterator[str]:
    """The lines of the table for Shell-7B, with gradient checkpointing."""
    from shellv_core.config import apply_overrides
    from shellv_core.stages.estimate_command import Plan, estimate
    from shellv_core.stages.presets import preset
    from shellv_core.training.memory import DEVICES

    names = ("a100-40", "a100-80", "h100")
    yield "| run, 8 GPUs | weights | gradients, optimizer, buffers | pass | total, GB | " + " | ".join(names) + " |"
    yield "|---" * (5 + len(names)) + "|"
    full = preset("shellv-7b")
    for name, (stage, overrides, devices, zero_stage) in SEVEN.items():
        config = apply_overrides(getattr(full, stage), [*overrides, "training.gradient_checkpointing=true"])
        plan = Plan(
            full.pretrain_projector.model, config.training, config.hacl, getattr(config, "lora", None),
            num_devices=devices, zero_stage=zero_stage,
        )  # fmt: skip
        found = estimate(plan, "cuda")
        states = found.gradients + found.optimizer + found.buffers
        values = [found.weights, states, found.total - found.weights - states, found.total]
        fits = ["yes" if found.total <= DEVICES[each] else "no" for each in names]
        yield f"| {name} | {' | '.join(f'{each / 1e9:.1f}' for each in values)} | {' | '.join(fits)} |"


def measured() -> Iterator[str]:
    """The lines of the table of nano's runs."""
    yield "| run | estimate, MB | measured, MB | estimate / measured |"
    yield "|---|---|---|---|"
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SHELLV_HOME"] = str(Path(folder) / "home")
        for each, estimated, found in measure(CASES, Path(folder)):
            yield f"| {each.name} | {estimated / 1e6:.0f} | {found / 1e6:.0f} | {estimated / found:.2f} |"


def main() -> int:
    """Print a table and write it into the document."""
    name = "seven" if "seven" in sys.argv[1:] else "measured"
    if name == "measured" and any(os.environ.get(key) != value for key, value in ALLOCATOR.items()):
        os.execve(sys.executable, [sys.executable, "-m", "tests.bench.memory"], {**os.environ, **ALLOCATOR})
    logging.disable(logging.WARNING)
    lines = []
    for line in {"seven": seven, "measured": measured}[name]():
        print(line, flush=True)
        lines.append(line)
    first, last = f"<!-- {name} -->", f"<!-- /{name} -->"
    text = DOCUMENT.read_text(encoding="utf-8")
    before, after = text[: text.index(first)], text[text.index(last) :]
    DOCUMENT.write_text("\n".join([before + first, *lines, after]), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
