"""What each of several gloo processes computes for `test_gather`; in one process, the joined batch of all."""

from __future__ import annotations

import types
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
from torch import distributed
from torch.nn.parallel import DistributedDataParallel

from shellv_core.models.hacl import HaclHeads
from shellv_core.training.batches import batch_images, make_batch
from shellv_core.training.config import HaclConfig, TrainingConfig
from shellv_core.training.examples import image_bytes, tokenize_samples
from shellv_core.training.features import CachedFeatures, pixel_batches, tower_features
from shellv_core.training.loop import set_trainable
from shellv_core.training.losses import gather
from shellv_core.training.losses.hacl import ContrastFeatures, contrastive_loss
from shellv_core.training.losses.queue import NegativeQueue
from shellv_core.training.model import TrainingModel
from tests.training.test_losses import random_features
from tests.training.tiny import tiny_model, tiny_samples

WORLD = 2
LEAVES = ("image", "caption", "hallucinated", "truth")
#: Which rows each process has of 6; slots for lies that it has of 2.
SPLITS = {
    "ragged": (((0, 4), 2), ((4, 6), 2)),
    "fewer lies": (((0, 4), 2), ((4, 6), 1)),
    "nothing on the second": (((0, 6), 2), ((6, 6), 2)),
    "nothing on the first": (((0, 0), 0), ((0, 6), 2)),
}
#: The rows of conversations that each process trains on, images rising.
CONVERSATIONS = ((0, 2, 4), (6, 10, 12, 14))


def whole(split: str) -> ContrastFeatures:
    """All rows; what a process has no slot for counts nowhere."""
    features = random_features(6, 2, masked=True, truths=True)
    for (first, last), slots in SPLITS[split]:
        if last > first:
            features.hallucinated_valid[first:last, slots:] = False
            features.truth_valid[first:last, slots:] = False
    return features


def part(split: str, rank: int) -> ContrastFeatures:
    (first, last), slots = SPLITS[split][rank]
    cut = {}
    for name, tensor in vars(whole(split)).items():
        cut[name] = (
            tensor[first:last] if tensor.ndim == 1 or name in ("image", "caption") else tensor[first:last, :slots]
        )
    return ContrastFeatures(**cut)


def with_leaves(features: ContrastFeatures) -> tuple[ContrastFeatures, dict[str, torch.Tensor]]:
    leaves = {name: getattr(features, name).clone().requires_grad_() for name in LEAVES}
    return ContrastFeatures(**{**vars(features), **leaves}), leaves


def losses(features, mode, rows=None, ranks=1):
    """The loss with a queue, truths and a margin, and its gradients by backward."""
    ring = NegativeQueue(4, 5).double()
    ring.push(random_features(2, 1, seed=1))
    temperature = torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    result = contrastive_loss(features, temperature, mode, ring.contents(), 1.3, rows, ranks)
    loss = result.objective(0.7, 0.4)
    loss.backward()
    metrics = [result.retrieval_accuracy, result.hallucination_margin, result.hallucination_accuracy]
    return {"loss": loss.detach(), "temperature": temperature.grad, "metrics": torch.stack(metrics)}


def gathered(split, mode, rank, module=gather):
    features, leaves = with_leaves(part(split, rank))
    joined, rows = module.gather_features(features)
    found = losses(joined, mode, rows, WORLD)
    return {**found, **{f"gradient.{name}": leaf.grad for name, leaf in leaves.items()}}


def joined(split, mode):
    features, leaves = with_leaves(whole(split))
    return {**losses(features, mode), **{f"gradient.{name}": leaf.grad for name, leaf in leaves.items()}}


def gradients_of_some(rank):
    """Only the first process's features learn; backward must not wait for the second's."""
    features = part("ragged", rank)
    leaves = {}
    if rank == 0:
        features, leaves = with_leaves(features)
    pool, rows = gather.gather_features(features)
    losses(pool, "batch", rows, WORLD)
    return {name: leaf.grad for name, leaf in leaves.items()}


def offset_fault():
    source = Path(gather.__file__).read_text()
    old = "first = sum(counts[: distributed.get_rank()])"
    assert source.count(old) == 1
    module = types.ModuleType("gather_mutated")
    exec(compile(source.replace(old, "first = 0"), module.__name__, "exec"), vars(module))
    return module


def training_step(rows, wrap=lambda module: module):
    """Gradients of the contrast of a tiny model, and its queue afterwards."""
    model, processor = tiny_model()
    samples = tiny_samples()
    examples = tokenize_samples(samples, processor.tokenizer, processor.image_token_id, 4, 256)
    pictures = pixel_batches(image_bytes(samples), processor)
    features = CachedFeatures(torch.cat([tower_features(model, batch) for batch in pictures]))
    torch.manual_seed(0)
    hacl = HaclConfig(weight=1.0, num_hallucinated=2, queue_size=12, text_margin_weight=0.5, text_margin=1.0)
    module = TrainingModel(model, HaclHeads(32), hacl)
    set_trainable(module, TrainingConfig(trainable=("projector", "language_model")))
    module.queue.push(
        ContrastFeatures(
            **{
                name: tensor.float() if tensor.is_floating_point() else tensor
                for name, tensor in vars(random_features(3, 1, width=8)).items()
                if tensor is not None
            }
        )
    )
    rows = np.asarray(rows)
    batch = make_batch(
        examples, rows, features.gather(batch_images(examples, rows)), processor.image_token_id, 0, 2, truths=True
    )
    wrapped = wrap(module)
    output = wrapped(batch)
    (output.contrast.objective(0.5, 0.5) + 0 * output.generation_loss_sum).backward()
    module.remember(output)
    gradients = {name: each.grad for name, each in module.named_parameters() if each.grad is not None}
    return {**gradients, **{f"queue.{name}": each for name, each in module.queue.named_buffers()}}


def work(rank: int, folder: str) -> None:
    """Compute everything in process `rank` and leave it as ``rank.pt`` in `folder`."""
    torch.set_num_threads(1)
    distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=WORLD, timeout=timedelta(seconds=60)
    )
    empty = torch.zeros(0, 5)
    found = {
        "gathered": {(split, mode): gathered(split, mode, rank) for split in SPLITS for mode in ("paired", "batch")},
        "fault": gathered("ragged", "batch", rank, offset_fault()),
        "some": gradients_of_some(rank),
        "nothing": len(gather.gather_features(ContrastFeatures.of(empty, empty, empty.view(0, 0, 5)))[0].image),
        "step": training_step(
            CONVERSATIONS[rank], lambda module: DistributedDataParallel(module, forward_sync_buffers=False)
        ),
    }
    torch.save(found, Path(folder) / f"{rank}.pt")
    distributed.destroy_process_group()
