"""Starting weights for a small language model that learns to see from nothing.

Words start as random unit vectors, and queries and keys of the first layer near the identity, so that from the first
step a word attends to tokens that resemble it: other places of the same word, and image tokens that were aligned with
it. Source of the idea: Trockman and Kolter, "Mimetic Initialization of Self-Attention Layers" (ICML 2023), here for
queries and keys of one layer.
"""

from __future__ import annotations

import torch
from torch.nn import functional
from transformers import PreTrainedModel

from shellv_core.errors import ModelError

NOISE_STD = 0.005


@torch.no_grad()
def initialize_for_matching(language_model: PreTrainedModel, identity_scale: float) -> None:
    """Set word embeddings and the first layer's query and key weights, in place.

    Args:
        identity_scale: factor of the identity in the query and key weights.

    Raises:
        ModelError: if the architecture has no such weights, or they are not square (grouped keys).
    """
    embeddings = language_model.get_input_embeddings().get_parameter("weight")
    embeddings.copy_(functional.normalize(torch.randn_like(embeddings), dim=-1))
    try:
        attention = language_model.get_submodule("model.layers.0.self_attn")
        weights = [attention.get_parameter(f"{name}.weight") for name in ("q_proj", "k_proj")]
    except AttributeError:
        raise ModelError(
            f"language_model.matching={identity_scale} needs model.layers.0.self_attn with q_proj and k_proj, which"
            f" {type(language_model).__name__} does not have; set it to null or take llama or starcoder2."
        ) from None
    for weight in weights:
        if weight.shape[0] != weight.shape[1]:
            raise ModelError(
                f"language_model.matching={identity_scale} needs square query and key weights, not"
                f" {tuple(weight.shape)}; give num_key_value_heads the value of num_attention_heads."
            )
        weight.copy_(identity_scale * torch.eye(len(weight)) + NOISE_STD * torch.randn_like(weight))
