"""``shellv estimate``: the memory that a training stage takes, and what would fit where it does not."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shellv_core.models.config import LoraConfig, ModelConfig
    from shellv_core.training.config import HaclConfig, PreferenceConfig, TrainingConfig
    from shellv_core.training.memory import MemoryEstimate
    from shellv_core.training.model import TrainingModel

DEVICE_NAMES = ("a100-40", "a100-80", "h100", "h200", "cpu")
STAGES = ("pretrain_projector", "finetune")
_EPILOG = """\
examples:
  shellv estimate --preset shellv-7b --device a100-40
  shellv estimate --preset shellv-7b --stage finetune --device h100 --devices 8 lora=null training.packing=true

Nothing is loaded or downloaded for the models that are known by name: Shell-7B, Vicuna-7B v1.5, CLIP ViT-L/14-336."""


@dataclass(frozen=True)
class Plan:
    """Settings of a run whose memory is asked for.

    Attributes:
        num_devices: that share a step; zero_stage: what they share among them, 0 for nothing.
    """

    model: ModelConfig
    training: TrainingConfig
    hacl: HaclConfig
    lora: LoraConfig | None = None
    preference: PreferenceConfig | None = None
    num_devices: int = 1
    zero_stage: int = 0


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the arguments."""
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = _EPILOG
    parser.add_argument("--preset", default="nano", metavar="NAME", help="start from its settings (nano)")
    parser.add_argument("--stage", default="finetune", choices=STAGES, help="(finetune)")
    parser.add_argument("--device", default="a100-80", choices=DEVICE_NAMES, help="what one device is (a100-80)")
    parser.add_argument("--devices", type=int, default=1, metavar="N", help="how many share a step (1)")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="settings of the stage: training.micro_batch_size=4"
    )


def main(args: argparse.Namespace) -> int:
    """Print the estimate, and other settings where it does not fit; returns 0, or 1 where it does not fit.

    Raises:
        ShellVError: for unknown settings, or a model whose sizes are not to be had.
    """
    import torch

    from shellv_core.config import apply_overrides
    from shellv_core.errors import ConfigError
    from shellv_core.stages.presets import preset
    from shellv_core.training.memory import DEVICES, device_memory

    if args.devices < 1:
        raise ConfigError(f"--devices={args.devices} is not possible; give 1 or more.")
    full = preset(args.preset)
    config: Any = apply_overrides(getattr(full, args.stage), args.overrides)
    plan = Plan(
        full.pretrain_projector.model if args.stage == "finetune" else config.model,
        config.training,
        config.hacl,
        getattr(config, "lora", None),
        getattr(config, "preference", None),
        args.devices,
        getattr(config.training, "zero_stage", None) or 0,
    )
    kind = "cpu" if args.device == "cpu" else "cuda"
    capacity = device_memory(torch.device("cpu")) if kind == "cpu" else DEVICES[args.device]
    found = estimate(plan, kind)
    print(table(found))  # noqa: T201 - the command's answer
    verdict = "fits" if found.total <= capacity else "does not fit"
    print(f"\nThis needs {found.total / 1e9:.1f} GB a device; {args.device} has {capacity / 1e9:.1f} GB: it {verdict}.")  # noqa: T201
    if found.total <= capacity:
        return 0
    fitting = [(change, each) for change, each in alternatives(plan, kind) if each.total <= capacity]
    print("\nThese settings fit:" if fitting else "\nNothing tried fits; take more or larger devices.")  # noqa: T201
    for change, each in fitting:
        print(f"  {each.total / 1e9:5.1f} GB  {change}")  # noqa: T201
    return 1


def estimate(plan: Plan, device_type: str) -> MemoryEstimate:
    """The memory that `plan` takes on each device."""
    from shellv_core.training.memory import estimate_memory
    from shellv_core.training.memory_batches import largest_batch

    module = module_of(plan)
    batch = largest_batch(module, plan.training, num_devices=plan.num_devices)
    quantization = plan.lora.quantization if plan.lora else None
    return estimate_memory(module, plan.training, batch, device_type, plan.num_devices, plan.zero_stage, quantization)


def module_of(plan: Plan) -> TrainingModel:
    """What `plan` trains, as it is trained, with shapes and no data."""
    import torch

    from shellv_core.models.hacl import HaclHeads
    from shellv_core.models.lora import add_lora
    from shellv_core.models.shapes import model_without_weights
    from shellv_core.training.loop import set_trainable
    from shellv_core.training.model import TrainingModel, frozen_copy
    from shellv_core.training.parts import learn_in_float32

    model = model_without_weights(plan.model)
    text: Any = model.config.text_config
    with torch.device("meta"):
        heads = HaclHeads(text.hidden_size, plan.hacl.heads) if plan.hacl.weight else None
        module = TrainingModel(model, heads, plan.hacl, plan.preference)
    set_trainable(module, plan.training)
    if plan.preference and plan.preference.weight and not plan.lora:
        module.reference = frozen_copy(model)
    if plan.lora:
        with torch.device("meta"):
            add_lora(model, plan.lora, "projector" in plan.training.trainable)
    learn_in_float32(module)
    return module


def alternatives(plan: Plan, device_type: str) -> Iterator[tuple[str, MemoryEstimate]]:
    """Changes of `plan` that need less, each with its estimate: mild ones first, then together."""
    from dataclasses import replace

    from shellv_core.models.config import LoraConfig

    training = plan.training
    small = _smaller(training)
    checkpointed = {} if training.gradient_checkpointing else {"gradient_checkpointing": True}
    changes: list[dict[str, Any]] = [each for each in (small, checkpointed, {**small, **checkpointed}) if each]
    bases = [("", plan)]
    if plan.num_devices > 1 and not plan.zero_stage:
        bases += [(f"ZeRO-{stage}", replace(plan, zero_stage=stage)) for stage in (2, 3)]
    if "language_model" in training.trainable:
        lora = plan.lora or LoraConfig()
        if not plan.lora:
            bases.append(("LoRA", replace(plan, lora=lora)))
        if not lora.quantization:
            bases.append(("QLoRA (nf4)", replace(plan, lora=lora.model_copy(update={"quantization": "nf4"}))))
    for name, base in bases:
        nothing: list[dict[str, Any]] = [{}] if name else []
        for change in nothing + changes:
            words = [name] * bool(name) + [f"training.{key}={_shown(value)}" for key, value in change.items()]
            yield ", ".join(words), estimate(replace(base, training=training.model_copy(update=change)), device_type)


def table(found: MemoryEstimate) -> str:
    """The estimate, line by line."""
    lines = [f"{name:<10} {value / 1e9:8.2f} GB" for name, value in vars(found).items()]
    return "\n".join([*lines, f"{'total':<10} {found.total / 1e9:8.2f} GB"])


def _smaller(training: TrainingConfig) -> dict[str, Any]:
    """A quarter of the forward pass, as far as that goes."""
    if training.packing:
        tokens = max(training.pack_tokens // 4, training.max_length)
        return {"pack_tokens": tokens} if tokens < training.pack_tokens else {}
    rows = training.micro_batch_size or training.global_batch_size
    return {"micro_batch_size": max(rows // 4, 1)} if rows > 1 else {}


def _shown(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
