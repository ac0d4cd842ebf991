"""Cross entropy over a large vocabulary, a chunk of positions at a time.

The logits of a chunk give its loss and, at once, its gradients, and are dropped: never do those of all positions exist
together. Same loss and gradients as the plain computation, and as many operations.

Shapes: L positions, C of them in a chunk, H hidden size, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from torch.utils.checkpoint import checkpoint


def chunked_cross_entropy(
    hidden_LH: torch.Tensor, lm_head: nn.Linear, label_ids_L: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """Sum over positions of the cross entropy of ``lm_head(hidden)`` in float32, a scalar.

    Args:
        chunk_size: C, positions whose logits exist at a time.
    """
    wanted = torch.is_grad_enabled()
    result: torch.Tensor = _ChunkedCrossEntropy.apply(
        hidden_LH, lm_head.weight, lm_head.bias, label_ids_L, chunk_size, wanted
    )
    return result


def log_probabilities(
    hidden_LH: torch.Tensor, lm_head: nn.Linear, label_ids_L: torch.Tensor, chunk_size: int
) -> torch.Tensor:
    """Of each label under ``lm_head(hidden)``, in nats, float32: (L,).

    What becomes of them is not known here, so beyond one chunk the backward pass makes the logits again.

    Args:
        chunk_size: C, positions whose logits exist at a time.
    """

    def of(hidden_CH: torch.Tensor, label_ids_C: torch.Tensor) -> torch.Tensor:
        logits_CV = functional.linear(hidden_CH, lm_head.weight, lm_head.bias)
        logits_CV = logits_CV.to(torch.promote_types(lm_head.weight.dtype, torch.float32))
        return -functional.cross_entropy(logits_CV, label_ids_C, reduction="none")

    chunks = list(zip(hidden_LH.split(chunk_size), label_ids_L.split(chunk_size), strict=True))
    if len(chunks) == 1 or not torch.is_grad_enabled():
        return torch.cat([of(*chunk) for chunk in chunks])
    return torch.cat([checkpoint(of, *chunk, use_reentrant=False, preserve_rng_state=False) for chunk in chunks])


class LabelLoss(nn.Module):
    """Both functions as a module, so that an engine that shards weights knows when a head's are read."""

    def forward(
        self,
        lm_head: nn.Linear,
        hidden_LH: torch.Tensor,
        label_ids_L: torch.Tensor,
        chunk_size: int,
        each: bool = False,
    ) -> torch.Tensor:
        """See `chunked_cross_entropy`, or `log_probabilities` for `each`."""
        function = log_probabilities if each else chunked_cross_entropy
        return function(hidden_LH, lm_head, label_ids_L, chunk_size)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_LH: torch.Tensor,
        weight_VH: torch.Tensor,
        bias_V: torch.Tensor | None,
        label_ids_L: torch.Tensor,
        chunk_size: int,
        wanted: bool,
    ) -> torch.Tensor:
        needs_hidden, needs_weight, needs_bias = (wanted and need for need in ctx.needs_input_grad[:3])
        sum_dtype = torch.promote_types(weight_VH.dtype, torch.float32)
        total = hidden_LH.new_zeros((), dtype=sum_dtype)
        gradient_LH = torch.empty_like(hidden_LH) if needs_hidden else None
        gradient_VH = torch.zeros_like(weight_VH, dtype=sum_dtype) if needs_weight else None
        gradient_V = torch.zeros_like(weight_VH[:, 0], dtype=sum_dtype) if needs_bias else None
        for start in range(0, len(hidden_LH), chunk_size):
            chunk = slice(start, start + chunk_size)
            hidden_CH, labels_C1 = hidden_LH[chunk], label_ids_L[chunk, None]
            logits_CV = functional.linear(hidden_CH, weight_VH, bias_V)  # in bfloat16 under autocast
            matmul_dtype = logits_CV.dtype
            logits_CV = logits_CV.to(sum_dtype)
            sums_C1 = logits_CV.logsumexp(dim=1, keepdim=True)
            total += (sums_C1 - logits_CV.gather(1, labels_C1)).sum()
            if not (needs_hidden or needs_weight or needs_bias):
                continue
            gradient_CV = logits_CV.sub_(sums_C1).exp_()
            gradient_CV.scatter_add_(1, labels_C1, gradient_CV.new_full(labels_C1.shape, -1.0))
            if gradient_V is not None:
                gradient_V += gradient_CV.sum(dim=0)
            gradient_CV = gradient_CV.to(matmul_dtype)
            if gradient_LH is not None:
                gradient_LH[chunk] = gradient_CV @ weight_VH.to(matmul_dtype)
            if gradient_VH is not None and gradient_VH.dtype == matmul_dtype:
                gradient_VH.addmm_(gradient_CV.T, hidden_CH.to(matmul_dtype))
            elif gradient_VH is not None:
                gradient_VH += gradient_CV.T @ hidden_CH.to(matmul_dtype)
        ctx.save_for_backward(
            gradient_LH,
            None if gradient_VH is None else gradient_VH.to(weight_VH.dtype),
            None if gradient_V is None or bias_V is None else gradient_V.to(bias_V.dtype),
        )
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scaled = (None if each is None else each * gradient.to(each.dtype) for each in ctx.saved_tensors)
        return (*scaled, None, None, None)
