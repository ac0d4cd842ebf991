"""Features of earlier steps as further negatives: first in, first out, empty at the start.

Part of a run's state: checkpoints keep its buffers. Processes that push the same joined features hold the same queue.
"""

from __future__ import annotations

import torch
from torch import nn

from shellv_core.training.losses.hacl import ContrastFeatures, QueuedNegatives


class NegativeQueue(nn.Module):
    """The last texts (captions, and lies that are not told from a truth of their own) and the last images.

    Args:
        size: slots for texts, and as many for images.
        width: D of the features.
    """

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.texts, self.images = _Ring(size, width), _Ring(size, width)

    def push(self, features: ContrastFeatures) -> None:
        """Append the valid captions, lies (image by image) and images, detached; the oldest leave.

        Call it after backward, whose graph may still hold what was here.
        """
        valid = features.valid
        lies = features.hallucinated_valid & valid[:, None] & ~features.truth_valid
        self.texts.push(
            torch.cat([features.caption[valid], features.hallucinated[lies]]),
            torch.cat([features.caption_group[valid], features.hallucinated_group[lies]]),
        )
        self.images.push(features.image[valid], features.caption_group[valid])

    def contents(self) -> QueuedNegatives:
        """The slots, those never filled marked as such."""
        return QueuedNegatives(
            self.texts.features,
            self.texts.valid,
            self.texts.groups,
            self.images.features,
            self.images.valid,
            self.images.groups,
        )

    def fill(self) -> float:
        """Share of the text slots that are filled, 0..1."""
        return float(self.texts.count) / len(self.texts.groups)


class _Ring(nn.Module):
    features: torch.Tensor
    groups: torch.Tensor
    count: torch.Tensor
    position: torch.Tensor

    def __init__(self, size: int, width: int) -> None:
        super().__init__()
        self.register_buffer("features", torch.zeros(size, width))
        self.register_buffer("groups", torch.zeros(size, dtype=torch.int64))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("position", torch.zeros((), dtype=torch.int64))

    @property
    def valid(self) -> torch.Tensor:
        return torch.arange(len(self.groups), device=self.groups.device) < self.count

    @torch.no_grad()
    def push(self, features: torch.Tensor, groups: torch.Tensor) -> None:
        size = len(self.groups)
        features, groups = features.detach()[-size:], groups[-size:]
        slots = (self.position + torch.arange(len(groups), device=groups.device)) % size
        self.features[slots] = features.to(self.features.dtype)
        self.groups[slots] = groups
        self.position.copy_((self.position + len(groups)) % size)
        self.count.copy_((self.count + len(groups)).clamp_max(size))
