"""Whether a model computes in slots what it computes by itself."""

from __future__ import annotations

from typing import Any

import torch

from shellv_core.errors import ServingError
from shellv_core.serving.inference.adapters import AdapterSet
from shellv_core.serving.inference.cache import PAGE, Placement, SlotCache
from shellv_core.serving.inference.forward import run_language_model

#: Relative difference of logits that rounding may make, in whatever number format; a wrong mask makes one near 1.
TOLERANCE = 0.2
INSTEAD = "serve it with engine.batching=serial (--batching serial)."


def check_slots(model: Any, adapters: AdapterSet, context_length: int) -> None:
    """Compare a short pass in slots with the model's own.

    Raises:
        ServingError: if they differ, or the language model does not attend to all positions.
    """
    config = model.config.get_text_config()
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < context_length:
        raise ServingError(
            f"this model sees the last {window} tokens only, which slots cannot do in a context of {context_length};"
            f" lower engine.context_length, or {INSTEAD}"
        )
    try:
        with torch.inference_mode():
            difference = _difference(model, adapters)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise ServingError(f"this model does not run in slots ({error}); {INSTEAD}") from error
    # Damaged weights are not told by a difference; each request's own check finds them.
    if difference > TOLERANCE:
        raise ServingError(
            f"this model computes something else in slots than by itself (relative difference {difference:.2f});"
            f" {INSTEAD}"
        )


def _difference(model: Any, adapters: AdapterSet) -> float:
    """Relative difference of the last logits of two sequences, whose last tokens follow in a second pass."""
    embed = model.get_input_embeddings()
    device = embed.weight.device
    size = min(embed.weight.shape[0], model.config.get_text_config().vocab_size)
    sequences = [torch.arange(length) * 7919 % size for length in (9, 6)]
    cache = SlotCache(model.config.get_text_config().num_hidden_layers)
    cache.resize(2, PAGE)
    padded = torch.nn.utils.rnn.pad_sequence([each[:-1] for each in sequences], batch_first=True)
    counts = [len(each) - 1 for each in sequences]
    last = torch.stack([each[-1:] for each in sequences])
    with adapters.together([None, None]):
        run_language_model(model, cache, Placement([0, 1], [0, 0], counts), embed(padded.to(device)))
        got = run_language_model(model, cache, Placement([0, 1], counts, [1, 1]), embed(last.to(device)))
    with adapters.alone(None):
        own = [model(input_ids=each[None].to(device)).logits[0, -1] for each in sequences]
    expected = torch.stack(own).float()
    return float((got.float().to(expected.device) - expected).norm() / expected.norm())
