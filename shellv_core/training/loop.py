"""The training loop: steps, progress, logs, checkpoints.

A run is a function of its model, examples, settings and seed. Killed at any point and started again with the same, it
goes on from its last checkpoint and ends with the same weights, bit for bit on one machine.
"""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from shellv_core.config import effective_values, fingerprint
from shellv_core.errors import Preempted
from shellv_core.logs import get_logger
from shellv_core.models.compose import projector_layers
from shellv_core.models.hacl import within_range
from shellv_core.progress import Progress
from shellv_core.training.batches import (
    Batch,
    batch_images,
    count_label_tokens,
    make_batch,
    plan_epoch,
    split_rows,
    steps_per_epoch,
)
from shellv_core.training.checkpoints import Checkpoints
from shellv_core.training.config import HaclConfig, TrainingConfig
from shellv_core.training.divergence import DivergenceGuard
from shellv_core.training.engines import Engine, make_engine
from shellv_core.training.examples import TYPES, Examples
from shellv_core.training.features import ImageFeatures
from shellv_core.training.flops import FlopFormula
from shellv_core.training.history import HISTORY_NAME, History
from shellv_core.training.losses.hacl import ContrastResult
from shellv_core.training.losses.preference import PreferenceResult
from shellv_core.training.losses.schedule import weight_factor
from shellv_core.training.meter import SUMMARY_STEPS, Meter
from shellv_core.training.model import TrainingModel
from shellv_core.training.packed import PackedRow
from shellv_core.training.preemption import should_stop, stop_requests
from shellv_core.training.processes import from_first, means, num_processes, rank, sums
from shellv_core.training.state import restore, run_state

logger = get_logger(__name__)
#: Every metric of a step.
METRICS = (
    "generation_loss",
    "image_to_text_loss",
    "text_to_image_loss",
    "retrieval_accuracy",
    "hallucination_margin",
    "hallucination_accuracy",
    "truth_loss",
    "text_margin_loss",
    "preference_loss",
    "preference_image_loss",
    "preference_anchor_loss",
    "reward_margin",
    "image_reward_margin",
    "preference_accuracy",
    "loss",
)


class Part(NamedTuple):
    """One forward pass of this process.

    Attributes:
        share: of what is contrasted in this pass, in all processes where they gather it, in the step's.
        own_share: of this process's conversations (with packing: of its preference's pairs) in the step's, times the
            number of processes, so that the mean over processes of what is so weighted is the step's.
    """

    batch: Batch | PackedRow
    share: float
    own_share: float


@dataclass(frozen=True)
class StepData:
    """What one optimizer step learns from.

    Attributes:
        parts: this process's forward passes, made as they are taken; all processes have as many.
        num_parts: how many.
        num_labels: tokens that all of them together learn, in all processes.
    """

    parts: Iterable[Part]
    num_parts: int
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
    """How a run went; rates count all processes, but not what earlier ones did before a kill.

    Attributes:
        metrics: losses (means over the last 50 steps) and what `meter.Meter.rates` gives.
        details: the engine in use; see `Engine`.
    """

    num_steps: int
    metrics: dict[str, float]
    details: dict[str, Any] = field(default_factory=dict)


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
    # Each process has a dropout of its own.
    torch.manual_seed(seed + rank())
    tower_runs = config.packing or not config.cache_features
    formula = FlopFormula(module, tower_runs)
    engine = make_engine(module, config)
    total = feed.total
    identity = fingerprint(effective_values(config), module.hacl, module.preference, seed, total, feed.identity)
    checkpoints = Checkpoints(checkpoint_directory, checkpoint_address, identity, config.checkpoint_keep)
    with stop_requests() as request, checkpoints:
        found = checkpoints.latest() if rank() == 0 else None
        first, meta = from_first([found.step, found.meta] if found else [0, {"position": None, "recent_losses": []}])
        step = first
        if first:
            restore(found, module, engine, seed, first)
            logger.info("%s: going on from step %d of %d", description, first, total)
        text_config: Any = module.model.config.text_config
        guard = DivergenceGuard(config, text_config.vocab_size, checkpoints, meta["recent_losses"])
        module.train()
        meter = Meter(module.model.device, formula, num_processes())
        highest_rate = max(getattr(config, f"{part}_learning_rate") for part in config.trainable)
        history = History(checkpoint_directory / HISTORY_NAME, first) if rank() == 0 else None
        last_log = first
        rates: dict[str, float] = {}
        with feed.attention(), Progress(total, description, "steps", initial=first) as counter:
            for step, data in enumerate(feed.steps(first, meta["position"]), start=first + 1):
                rate_factor = learning_rate_factor(step, total, config.warmup_ratio)
                meter.add(_step(module, data, engine, rate_factor, step, total, meter, guard))
                rates = meter.rates(feed.seconds_waited())
                counter.update(1, loss=meter.recent[-1]["loss"], **rates)
                if step % config.log_every_steps == 0 or step == total:
                    values = {**meter.losses(step - last_log), **rates, "learning_rate": highest_rate * rate_factor}
                    if history is not None:
                        history.add(step, values)
                    log(values, step)
                    last_log = step
                stop = should_stop(bool(request.signal))
                due = step % config.checkpoint_every_steps == 0 and not guard.suspicious
                if due or stop or step == total:
                    state = run_state(module, engine)
                    guard.check_state(step, state)
                    if rank() == 0:
                        checkpoints.save(step, state, {"position": feed.position(), "recent_losses": guard.recent})
                if stop:
                    break
        checkpoints.wait()
        if should_stop(bool(request.signal)):
            raise Preempted(
                f"stopped at step {step} by {request.signal or 'a signal'}; run the same command again to go on"
            )
    module.eval()
    engine.close()
    return TrainingSummary(total, {**meter.losses(SUMMARY_STEPS), **rates}, engine.details)


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


def _step(
    module: TrainingModel,
    data: StepData,
    engine: Engine,
    rate_factor: float,
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
    counts = np.zeros(4)
    # The engine takes the mean over processes; this loss is a sum.
    generation_scale = num_processes() / max(data.num_labels, 1)
    for number, (batch, share, own_share) in enumerate(data.parts, start=1):
        counts += meter.counts(batch)
        with engine.micro_step(last=number == data.num_parts):
            output = engine.forward(batch.to(device))
            losses = {"generation_loss": output.generation_loss_sum * generation_scale}
            loss = losses["generation_loss"]
            if output.contrast is not None and output.features is not None:
                loss = loss + contrast_weight * share * output.contrast.objective(
                    hacl.truth_weight, hacl.text_margin_weight
                )
                if output.features.valid.any():
                    losses |= {key: share * value for key, value in _contrast_metrics(output.contrast, hacl).items()}
                    margins += [output.contrast.margin_sums.tolist(), output.contrast.margin_counts.tolist()]
            if output.preference is not None:
                preference = module.preference
                objective = output.preference.objective(preference.image_weight, preference.anchor_weight)
                loss = loss + preference.weight * own_share * objective
                losses |= {key: own_share * value for key, value in _preference_metrics(output.preference).items()}
            engine.backward(loss)
        module.remember(output)
        losses["loss"] = loss
        for key, value in losses.items():
            totals[key] = totals.get(key, 0.0) + float(value.detach())
    totals = means(totals, METRICS)
    meter.count(*sums(counts.tolist()))
    margins = np.reshape(sums(margins.flatten().tolist()), margins.shape)
    totals["gradient_norm"] = engine.gradient_norm()
    guard.check(step, totals)
    engine.step(rate_factor)
    if module.heads is not None:
        engine.change(module.heads.temperature, within_range)
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
                pieces = self._pieces(rows)
                parts = self._parts(pieces, len(rows), start + step + 1)
                yield StepData(parts, len(pieces), count_label_tokens(self.examples, rows))

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

    def _pieces(self, rows: np.ndarray) -> list[np.ndarray]:
        """The rows of a step, cut into what all processes together compute at a time."""
        size = self.config.micro_batch_size * num_processes() if self.config.micro_batch_size else len(rows)
        return [rows[start : start + size] for start in range(0, len(rows), size)]

    def _parts(self, pieces: list[np.ndarray], num_rows: int, turn: int) -> Iterator[Part]:
        count, mine = num_processes(), rank()
        for piece in pieces:
            split = split_rows(self.examples, piece, count)
            own_share = count * len(split[mine]) / num_rows
            share = len(piece) / num_rows if self.module.hacl.gather else own_share
            yield Part(self._batch(split, turn), share, own_share)

    def _batch(self, split: list[np.ndarray], turn: int) -> Batch:
        module, mine = self.module, rank()
        rows = split[mine]
        images = batch_images(self.examples, rows)
        contrasted = images
        if module.hacl.gather and mine:
            # An image counts once, though conversations about it are in several processes.
            contrasted = np.setdiff1d(images, batch_images(self.examples, np.concatenate(split[:mine])))
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
            contrasted,
            self.config.loss_chunk,
        )
