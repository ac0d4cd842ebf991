"""Word alignment: teach the projector to speak the language model's words before the language model takes part.

For a language model without pretraining, image tokens are noise, and the projector learns next to nothing from its
generation loss. Here each image token is projected and compared with the model's own word embeddings, and an image's
tokens together must name the words of its caption: multiple-instance learning with a soft maximum over the tokens t,
    logit(image, word) = 20 * (logsumexp_t(20 * cos(projector(x_t), e_word)) / 20 - 0.5),
under binary cross-entropy. Only the projector learns; no language model runs, so an epoch costs a small part of a
training epoch. At the end the projector is scaled so that image tokens are as long as words. Words in over half of the
captions, or in very few, carry no lesson and are left out. The soft maximum stands where Fang et al., "From Captions
to Visual Concepts and Back" (CVPR 2015), have noisy-or, and word embeddings where they have free classifiers; cosines,
since the language model's first layer normalizes what it reads.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch.nn import functional
from transformers import LlavaForConditionalGeneration

from shellv_core.errors import TrainingError
from shellv_core.models.compose import projector_layers
from shellv_core.progress import Progress
from shellv_core.training.config import AlignmentConfig
from shellv_core.training.examples import Examples
from shellv_core.training.features import ImageFeatures

SCALE, SHARPNESS, THRESHOLD = 20.0, 20.0, 0.5
WARMUP_STEPS = 30
NORM_IMAGES = 512


def align_words(
    model: LlavaForConditionalGeneration,
    examples: Examples,
    features: ImageFeatures,
    config: AlignmentConfig,
    seed: int,
    log: Callable[[dict[str, float], int], None],
) -> dict[str, float]:
    """Train the projector of `model`, in place, on the captions of `examples`.

    Args:
        features: of the images that `examples` number.
        log: receives metrics and the epoch.

    Returns:
        alignment_loss (summed over words, mean over the last epoch's images) and alignment_f1 (of the words named in
        training).

    Raises:
        TrainingError: if no caption holds a word to learn from, or the loss is not finite.
    """
    images, targets, token_ids = caption_words(examples, config.min_captions, config.max_share)
    projector, layers = model.model.multi_modal_projector, torch.nn.ModuleList(projector_layers(model))
    device = model.device
    all_embeddings = model.get_input_embeddings().get_parameter("weight").detach().float()
    embeddings = functional.normalize(all_embeddings[torch.from_numpy(token_ids).to(device)], dim=-1)
    optimizer = torch.optim.AdamW(
        layers.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, betas=(0.9, 0.98), fused=True
    )
    per_epoch = max(len(images) // config.batch_size, 1)
    total = config.epochs * per_epoch
    generator = np.random.default_rng([seed, len(images)])
    metrics: dict[str, float] = {}
    with _trainable(layers), Progress(total, "aligning words", "steps") as counter:
        for epoch in range(config.epochs):
            loss_sum, hits, named, present = 0.0, 0.0, 0.0, 0.0
            order = generator.permutation(len(images))[: per_epoch * config.batch_size]
            for step, rows in enumerate(np.array_split(order, per_epoch), start=epoch * per_epoch):
                wanted = torch.from_numpy(targets[rows]).to(device, torch.float32)
                tokens = projector(features.gather(images[rows]).to(device).float())
                cosines = functional.normalize(tokens, dim=-1) @ embeddings.T
                logits = SCALE * (torch.logsumexp(SHARPNESS * cosines, dim=1) / SHARPNESS - THRESHOLD)
                # Summed over words, so that the rate does not depend on the size of the vocabulary.
                loss = functional.binary_cross_entropy_with_logits(logits, wanted, reduction="sum") / len(rows)
                if not torch.isfinite(loss):
                    raise TrainingError(
                        f"word alignment: the loss is {loss.item()} in epoch {epoch}; lower alignment.learning_rate"
                        f" ({config.learning_rate})."
                    )
                cosine = 0.5 * (1 + math.cos(math.pi * step / total))
                for group in optimizer.param_groups:
                    group["lr"] = config.learning_rate * (0.95 * cosine + 0.05) * min(1.0, (step + 1) / WARMUP_STEPS)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                optimizer.step()
                said = logits.detach() > 0
                loss_sum += loss.item() / per_epoch
                hits += (said & (wanted > 0)).sum().item()
                named, present = named + said.sum().item(), present + wanted.sum().item()
                counter.update(1, loss=loss.item())
            metrics = {"alignment_loss": loss_sum, "alignment_f1": 2 * hits / max(named + present, 1.0)}
            log(metrics, epoch)
        _match_norms(projector, layers[-1], features.gather(images[:NORM_IMAGES]).to(device).float(), all_embeddings)
    return metrics


@contextlib.contextmanager
def _trainable(module: torch.nn.Module) -> Iterator[None]:
    before = [parameter.requires_grad for parameter in module.parameters()]
    module.requires_grad_(True)
    try:
        yield
    finally:
        # Left there, the last ones would be added to those of the next optimizer's first step.
        module.zero_grad(set_to_none=True)
        for parameter, requires_grad in zip(module.parameters(), before, strict=True):
            parameter.requires_grad_(requires_grad)


@torch.no_grad()
def _match_norms(
    projector: torch.nn.Module, last: torch.nn.Module, features: torch.Tensor, embeddings: torch.Tensor
) -> None:
    ratio = embeddings.norm(dim=-1).median() / projector(features).norm(dim=-1).mean()
    for parameter in last.parameters():
        parameter.mul_(ratio)


def caption_words(examples: Examples, min_captions: int, max_share: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Which words the captions hold, of those that tell captions apart.

    Returns:
        images with a caption (K,), a boolean matrix (K, W) and the token ids of its columns (W,).

    Raises:
        TrainingError: if there are none.
    """
    lengths = examples.captions.lengths
    images = np.flatnonzero(lengths)
    owners = np.repeat(np.arange(len(images)), lengths[images])
    tokens = examples.captions.values.astype(np.int64)
    pairs = np.unique(np.stack([owners, tokens]), axis=1)
    token_ids, counts = np.unique(pairs[1], return_counts=True)
    kept = token_ids[(counts >= min_captions) & (counts <= max_share * len(images))]
    if not len(kept):
        raise TrainingError(
            f"word alignment has no word to learn: of {len(images)} captions, none holds a word that is in at least"
            f" {min_captions} and at most {max_share:.0%} of them. Give data with captions, or set alignment=null."
        )
    columns = np.searchsorted(kept, pairs[1]).clip(max=len(kept) - 1)
    inside = kept[columns] == pairs[1]
    targets = np.zeros((len(images), len(kept)), dtype=bool)
    targets[pairs[0][inside], columns[inside]] = True
    return images, targets, kept
