"""Joins the features of several processes, with gradients, whatever number of rows each holds.

W processes that contrast their own rows with the joined features get the loss and, after the mean that data-parallel
training takes, the gradients of one process with the joined batch.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import distributed
from torch.nn import functional

from shellv_core.training.losses.hacl import ContrastFeatures
from shellv_core.training.processes import num_processes

INTEGERS = ("caption_group", "hallucinated_group", "hallucinated_type", "truth_group")
MASKS = ("valid", "hallucinated_valid", "truth_valid")


def gather_features(features: ContrastFeatures) -> tuple[ContrastFeatures, tuple[int, int]]:
    """Join the features of all processes in the order of their ranks.

    A collective call: every process makes it, with no rows where it has none, and if gradients flow, every process
    runs backward through what it got.

    Args:
        features: of this process, (N, D) and so on; N and K may differ between processes, D may not.

    Returns:
        The joined features, and the first and last (exclusive) row of this process in them.
    """
    num_rows, num_slots, width = features.hallucinated.shape
    device = features.image.device
    learns = any(each.requires_grad for each in (features.image, features.caption, features.hallucinated))
    mine = torch.tensor([num_rows, num_slots, learns, features.truth is not None], device=device)
    everyones = [[int(each) for each in row] for row in _gathered(mine[None], num_processes()).tolist()]
    counts = [row[0] for row in everyones]
    slots, anyone_learns, anyone_has_truth = (max(row[index] for row in everyones) for index in (1, 2, 3))
    longest = max(counts)

    texts = [features.hallucinated]
    if anyone_has_truth:
        texts.append(torch.zeros_like(features.hallucinated) if features.truth is None else features.truth)
    padding = (0, 0, 0, slots - num_slots)
    parts = [functional.pad(each, padding).flatten(1) for each in texts]
    floats = functional.pad(torch.cat([features.image, features.caption, *parts], dim=1), (0, 0, 0, longest - num_rows))
    if anyone_learns and not floats.requires_grad:
        # The backward pass is collective too.
        floats = floats.detach().requires_grad_()
    columns = {name: _columns(getattr(features, name), slots) for name in (*INTEGERS, *MASKS)}
    widths = [each.shape[1] for each in columns.values()]
    integers = functional.pad(torch.cat(list(columns.values()), dim=1), (0, 0, 0, longest - num_rows))

    kept = torch.cat([torch.arange(count, device=device) + rank * longest for rank, count in enumerate(counts)])
    floats = _gathered_with_gradients(floats)[kept]
    numbers = dict(zip(columns, _gathered(integers, num_processes())[kept].split(widths, dim=1), strict=True))
    image, caption, *others = floats.split([width, width, *[slots * width] * len(texts)], dim=1)
    hallucinated, *truths = (each.reshape(len(kept), slots, width) for each in others)
    joined = ContrastFeatures(
        image=image,
        caption=caption,
        hallucinated=hallucinated,
        valid=numbers["valid"][:, 0].bool(),
        hallucinated_valid=numbers["hallucinated_valid"].bool(),
        caption_group=numbers["caption_group"][:, 0],
        hallucinated_group=numbers["hallucinated_group"],
        hallucinated_type=numbers["hallucinated_type"],
        truth_valid=numbers["truth_valid"].bool(),
        truth_group=numbers["truth_group"],
        truth=truths[0] if truths else None,
    )
    first = sum(counts[: distributed.get_rank()])
    return joined, (first, first + num_rows)


def _columns(tensor: torch.Tensor, slots: int) -> torch.Tensor:
    """Integers or bools of shape (N,) or (N, K) as integers (N, 1) or (N, slots)."""
    return tensor.long()[:, None] if tensor.ndim == 1 else functional.pad(tensor.long(), (0, slots - tensor.shape[1]))


def _gathered(tensor: torch.Tensor, world: int) -> torch.Tensor:
    result = tensor.new_empty((world * len(tensor), *tensor.shape[1:]))
    distributed.all_gather_single(result, tensor.contiguous())
    return result


def _gathered_with_gradients(tensor: torch.Tensor) -> torch.Tensor:
    from torch.distributed._functional_collectives import all_gather_single_autograd

    return all_gather_single_autograd(tensor.contiguous(), 0, cast(distributed.ProcessGroup, distributed.group.WORLD))
