"""The training loop: steps, progress, logs, checkpoints.

A run is a function of its model, examples, settings and seed. Killed at any point and started again with the same, it
goes on from its last checkpoint and ends with the same weights, bit for bit on one machine.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import nn

from shellv_core.config import effective_values, fingerprint
from shellv_core.errors import Preempted, TrainingError
from shellv_core.logs import get_logger
from shellv_core.models.compose import projector_layers
from shellv_core.progress import Progress
from shellv_core.training.batches import (
    Batch,
    batch_images,
    count_label_tokens,
    make_batch,
    plan_epoch,
    steps_per_epoch,
)
from shellv_core.training.checkpoints import Checkpoints, module_state, restore
from shellv_core.training.config import HaclConfig, TrainingConfig
from shellv_core.training.divergence import DivergenceGuard
from shellv_core.training.examples import TYPES, Examples
from shellv_core.training.features import ImageFeatures
from shellv_core.training.flops import FlopFormula
from shellv_core.training.losses.hacl import ContrastResult
from shellv_core.training.losses.preference import PreferenceResult
from shellv_core.training.losses.schedule import weight_factor
from shellv_core.training.meter import SUMMARY_STEPS, Meter
from shellv_core.training.model import TrainingModel
from shellv_core.training.packed import PackedRow
from shellv_core.training.parts import PartName, learning_rates, part_of
from shellv_core.training.preemption import should_stop, stop_requests

logger = get_logger(__name__)


@dataclass(frozen=True)
class StepData:
    """What one optimizer step learns from.

    Attributes:
        parts: its forward passes, made as they are taken, and each one's share in the means of the contrastive losses.
        num_labels: tokens that all of them together learn.
    """

    parts: Iterable[tuple[Batch | PackedRow, float]]
    num_labels: int


class Feed(Protocol):
    """Where a run gets its steps from.

    Attributes:
        total: optimizer steps of the run.
        identity: what decides its data, in JSON's types.
    """

    total: int
    identity: Any

    def steps(self, first: int, position: dict[str, Any] | None) -> Iterator[StepData]:
        """The steps after the `first`, where the feed stood at `position`."""

    def position(self) -> dict[str, Any] | None:
        """Where the feed stands, in JSON's types; None if the step says it."""

    def seconds_waited(self) -> float | None:
        """How long steps had to be waited for so far; None if they are not made ahead."""

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """The attention that its forward and backward passes need."""


@dataclass(frozen=True)
class TrainingSummary:
    """How a run went; rates count this process only, not what an earlier one did before a kill.

    Attributes:
        metrics: losses (means over the last 50 steps) and what `meter.Meter.rates` gives.
    """

    num_steps: int
    metrics: dict[str, float]


def train(
    module: TrainingModel,
    examples: Examples,
    features: ImageFeatures,
    config: TrainingConfig,
    seed: int,
    checkpoint_directory: Path,
    log: Callable[[dict[str, float], int], None],
    description: str = "training",
    checkpoint_address: str | None = None,
) -> TrainingSummary:
    """`train_from` padded batches of `examples`.

    Args:
        features: of the images that `examples` number.
    """
    feed = PaddedFeed(module, examples, features, config, seed)
    return train_from(feed, module, config, seed, checkpoint_directory, log, description, checkpoint_address)


def train_from(
    feed: Feed,
    module: TrainingModel,
    config: TrainingConfig,
    seed: int,
    checkpoint_directory: Path,
    log: Callable[[dict[str, float], int], None],
    description: str = "training",
    checkpoint_address: str | None = None,
) -> TrainingSummary:
    """Train the parameters of `module` that require gradients, in place.

    Args:
        feed: `PaddedFeed` or `packed_feed.PackedFeed`.
        module: its parts that shall learn require gradients; see `set_trainable`.
        checkpoint_directory: local; a checkpoint in it is continued.
        log: receives metrics and the step, every `config.log_every_steps`.
        checkpoint_address: folder of this run's own for copies of the checkpoints, to go on from on another machine.

    Raises:
        TrainingError: if the loss is not finite or explodes, nothing is trainable, or the checkpoint is another run's.
        Preempted: after a signal that asked to stop, with a checkpoint of the last step.
    """
    torch.manual_seed(seed)
    optimizer = build_optimizer(module, config)
    total = feed.total
    values = effective_values(config)
    identity = fingerprint(values, module.hacl, module.preference, seed, total, feed.identity)
    checkpoints = Checkpoints(checkpoint_directory, checkpoint_address, identity, config.checkpoint_keep)
    with stop_requests() as request, checkpoints:
        found = checkpoints.latest()
        first = step = found.step if found else 0
        if found:
            restore(found, module, optimizer)
            logger.info("%s: going on from step %d of %d", description, first, total)
        meta = found.meta if found else {"position": None, "recent_losses": []}
        text_config: Any = module.model.config.text_config
        guard = DivergenceGuard(config, text_config.vocab_size, checkpoints, meta["recent_losses"])
        module.train()
        tower_runs = config.packing or not config.cache_features
        meter = Meter(module.model.device, FlopFormula(module, tower_runs))
        last_log = first
        rates: dict[str, float] = {}
        with feed.attention(), Progress(total, description, "steps", initial=first) as counter:
            for step, data in enumerate(feed.steps(first, meta["position"]), start=first + 1):
                for group in optimizer.param_groups:
                    group["lr"] = group["base_lr"] * learning_rate_factor(step, total, config.warmup_ratio)
                meter.add(_step(module, data, config, optimizer, step, total, meter, guard))
                rates = meter.rates(feed.seconds_waited())
                counter.update(1, loss=meter.recent[-1]["loss"], **rates)
                if step % config.log_every_steps == 0 or step == total:
                    log({**meter.losses(step - last_log), **rates}, step)
                    last_log = step
                stop = should_stop(bool(request.signal))
                due = step % config.checkpoint_every_steps == 0 and not guard.suspicious
                if due or stop or step == total:
                    state = module_state(module, optimizer)
                    guard.check_state(step, state)
                    checkpoints.save(step, state, {"position": feed.position(), "recent_losses": guard.recent})
                if stop:
                    break
        checkpoints.wait()
        if should_stop(bool(request.signal)):
            raise Preempted(
                f"stopped at step {step} by {request.signal or 'a signal'}; run the same command again to go on"
            )
    module.eval()
    return TrainingSummary(total, {**meter.losses(SUMMARY_STEPS), **rates})


def set_trainable(module: TrainingModel, config: TrainingConfig) -> None:
    """Let the parts that `config.trainable` names, and HACL's heads, require gradients; freeze all else."""
    module.requires_grad_(False)
    inner = module.model
    if "projector" in config.trainable:
        for layer in projector_layers(inner):
            layer.requires_grad_(True)
    if "language_model" in config.trainable:
        for parameter in itertools.chain(inner.model.language_model.parameters(), inner.lm_head.parameters()):
            # Quantized weights cannot.
            parameter.requires_grad_(parameter.is_floating_point())
    if module.heads is not None:
        module.heads.requires_grad_(True)


def build_optimizer(module: TrainingModel, config: TrainingConfig) -> torch.optim.Optimizer:
    """AdamW with one learning rate per part; vectors (norms, biases) and the temperature do not decay.

    Raises:
        TrainingError: if nothing is trainable.
    """
    rates = learning_rates(module, config)
    groups: dict[tuple[PartName, bool], list[nn.Parameter]] = {}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((part_of(name), parameter.ndim > 1), []).append(parameter)
    if not groups:
        raise TrainingError(f"nothing is trainable with training.trainable={config.trainable!r}.")
    return torch.optim.AdamW(
        [
            {"params": parameters, "base_lr": rates[part], "weight_decay": config.weight_decay if decays else 0.0}
            for (part, decays), parameters in groups.items()
        ],
        betas=(0.9, config.adam_beta2),
        fused=True,
    )


def total_steps(num_rows: int, config: TrainingConfig) -> int:
    """Optimizer steps of a run."""
    if config.max_steps is not None:
        return config.max_steps
    return max(math.ceil(config.epochs * steps_per_epoch(num_rows, config.global_batch_size)), 1)


def learning_rate_factor(step: int, total: int, warmup_ratio: float) -> float:
    """Factor of the learning rate in `step` (from 1): linear warm-up, then a cosine that ends near 0."""
    warmup = math.ceil(total * warmup_ratio)
    if step <= warmup:
        return step / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup - 1) / max(total - warmup, 1)))


def precision(autocast: bool, device: torch.device) -> contextlib.AbstractContextManager[None]:
    """The context of a forward pass: bfloat16 autocast, or none."""
    return torch.autocast(device.type, torch.bfloat16) if autocast else contextlib.nullcontext()


def _step(
    module: TrainingModel,
    data: StepData,
    config: TrainingConfig,
    optimizer: torch.optim.Optimizer,
    step: int,
    total: int,
    meter: Meter,
    guard: DivergenceGuard,
) -> dict[str, float]:
    device = module.model.device
    hacl = module.hacl
    contrast_weight = hacl.weight * weight_factor(step, total, hacl.weight_schedule, hacl.weight_warmup_ratio)
    totals: dict[str, float] = {}
    margins = np.zeros((2, len(TYPES)))
    optimizer.zero_grad(set_to_none=True)
    for batch, share in data.parts:
        with precision(config.precision == "bf16", device):
            output = module(batch.to(device))
        losses = {"generation_loss": output.generation_loss_sum / max(data.num_labels, 1)}
        loss = losses["generation_loss"]
        if output.contrast is not None:
            loss = loss + contrast_weight * share * output.contrast.objective(
                hacl.truth_weight, hacl.text_margin_weight
            )
            losses |= {key: share * value for key, value in _contrast_metrics(output.contrast, hacl).items()}
            margins += [output.contrast.margin_sums.tolist(), output.contrast.margin_counts.tolist()]
        if output.preference is not None:
            preference = module.preference
            objective = output.preference.objective(preference.image_weight, preference.anchor_weight)
            loss = loss + preference.weight * share * objective
            losses |= {key: share * value for key, value in _preference_metrics(output.preference).items()}
        loss.backward()
        module.remember(output)
        losses["loss"] = loss
        for key, value in losses.items():
            totals[key] = totals.get(key, 0.0) + float(value.detach())
        meter.count(*meter.counts(batch))
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    totals["gradient_norm"] = float(nn.utils.clip_grad_norm_(parameters, config.max_grad_norm))
    guard.check(step, totals)
    optimizer.step()
    if module.heads is not None:
        module.heads.clamp_temperature()
        totals["temperature"] = float(module.heads.temperature.detach())
    if module.queue is not None:
        totals["queue_fill"] = module.queue.fill()
    for name, margin_sum, count in zip(TYPES, *margins, strict=True):
        if count:
            totals[f"hallucination_margin_{name}"] = margin_sum / count
    return totals


def _contrast_metrics(contrast: ContrastResult, hacl: HaclConfig) -> dict[str, torch.Tensor]:
    metrics = {
        "image_to_text_loss": contrast.image_to_text,
        "text_to_image_loss": contrast.text_to_image,
        "retrieval_accuracy": contrast.retrieval_accuracy,
        "hallucination_margin": contrast.hallucination_margin,
        "hallucination_accuracy": contrast.hallucination_accuracy,
    }
    if contrast.truth is not None:
        metrics["truth_loss"] = contrast.truth
    if hacl.text_margin_weight:
        metrics["text_margin_loss"] = contrast.text_margin
    return metrics


def _preference_metrics(preference: PreferenceResult) -> dict[str, torch.Tensor]:
    return {
        "preference_loss": preference.answer,
        "preference_image_loss": preference.image,
        "preference_anchor_loss": preference.anchor,
        "reward_margin": preference.reward_margin,
        "image_reward_margin": preference.image_reward_margin,
        "preference_accuracy": preference.accuracy,
    }


class PaddedFeed:
    """Right-padded batches of conversations of similar length; see `batches`."""

    def __init__(
        self, module: TrainingModel, examples: Examples, features: ImageFeatures, config: TrainingConfig, seed: int
    ) -> None:
        """Take `features` of the images that `examples` number."""
        self.module, self.examples, self.features, self.config, self.seed = module, examples, features, config, seed
        self.total = total_steps(len(examples), config)
        values = examples.input_ids.values
        self.identity = [len(examples), examples.num_images, int(values.sum()), len(values)]

    def steps(self, first: int, position: dict[str, Any] | None) -> Iterator[StepData]:
        """See `Feed`."""
        size = self.config.global_batch_size
        per_epoch = steps_per_epoch(len(self.examples), size)
        lengths = self.examples.input_ids.lengths
        for epoch in range(first // per_epoch, math.ceil(self.total / per_epoch)):
            batches = plan_epoch(lengths, size, self.seed, epoch)
            start = epoch * per_epoch
            for step in range(max(first - start, 0), min(self.total - start, per_epoch)):
                rows = batches[step]
                yield StepData(self._parts(rows, start + step + 1), count_label_tokens(self.examples, rows))

    def position(self) -> None:
        """See `Feed`."""

    def seconds_waited(self) -> None:
        """See `Feed`."""

    @contextlib.contextmanager
    def attention(self) -> Iterator[None]:
        """On CPU, torch's fused attention in bfloat16 costs several times what plain matrix products cost."""
        language_model = self.module.model.model.language_model
        usual = language_model.config._attn_implementation
        if self.config.precision == "bf16" and self.module.model.device.type == "cpu":
            language_model.set_attn_implementation("eager")
        try:
            yield
        finally:
            language_model.set_attn_implementation(usual)

    def _parts(self, rows: np.ndarray, turn: int) -> Iterator[tuple[Batch, float]]:
        size = self.config.micro_batch_size or len(rows)
        for start in range(0, len(rows), size):
            part = rows[start : start + size]
            yield self._batch(part, turn), len(part) / len(rows)

    def _batch(self, rows: np.ndarray, turn: int) -> Batch:
        module, images = self.module, batch_images(self.examples, rows)
        return make_batch(
            self.examples,
            rows,
            self.features.gather(images) if len(images) else None,
            module.model.config.image_token_id,
            module.model.generation_config.pad_token_id,
            module.hacl.num_hallucinated if module.heads is not None else None,
            turn,
            module.hacl.truth_weight > 0,
            module.preference.weight > 0,
        )
