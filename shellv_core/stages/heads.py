"""HACL's heads between stages: a file beside the model, never part of it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from shellv_core.errors import ModelError
from shellv_core.stages.runner import StageRun
from shellv_core.storage import InputDirectory
from shellv_core.training.config import HaclConfig

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration

    from shellv_core.models.hacl import HaclHeads

HEADS = "hacl/heads.safetensors"


def start_heads(
    config: HaclConfig, model: LlavaForConditionalGeneration, seed: int, earlier: InputDirectory | None = None
) -> HaclHeads | None:
    """The heads that training starts from: those in an earlier stage's output, or new ones; None without the objective.

    Raises:
        ModelError: if the earlier heads are others than `config` asks for.
    """
    if not config.weight:
        return None
    import torch

    from shellv_core.models.hacl import HaclHeads, load_heads

    hidden_size = model.lm_head.in_features
    if earlier is not None and earlier.files(HEADS):
        heads = load_heads(earlier.fetch(HEADS))
        if (heads.kind, heads.hidden_size) != (config.heads, hidden_size):
            raise ModelError(
                f"pretraining left HACL heads of kind {heads.kind!r} for hidden size {heads.hidden_size}, this stage"
                f" wants kind {config.heads!r} for {hidden_size}: give both stages the same hacl.heads."
            )
        return heads
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return HaclHeads(hidden_size, config.heads)


def put_heads(heads: HaclHeads | None, run: StageRun[Any]) -> None:
    """Write the heads, if there are any, beside the stage's output."""
    if heads is None:
        return
    from shellv_core.models.hacl import save_heads

    path = run.work / "heads.safetensors"
    save_heads(heads, path)
    run.output.put_file(path, HEADS)
