"""HACL's heads: what maps hidden states to the space where images and captions are compared.

They live beside the model in a file of their own and are not part of an exported model.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional

from shellv_core.errors import ModelError

INITIAL_TEMPERATURE = 0.07
TEMPERATURE_RANGE = (0.001, 0.5)
METADATA_NAME = "heads"
HeadKind = Literal["linear", "none"]


class HaclHeads(nn.Module):
    """Two linear heads, hidden_size -> hidden_size // 4 with bias, or none, and a learned temperature.

    Args:
        kind: "none" compares the hidden states themselves, as the paper does.

    Source: X-PLUG/mPLUG-HalOwl@63863fc hacl/llava/model/llava_arch.py (vision_projector, text_projector, itc_temp).
    """

    def __init__(self, hidden_size: int, kind: HeadKind = "linear") -> None:
        super().__init__()
        self.hidden_size, self.kind = hidden_size, kind
        self.output_size = hidden_size // 4 if kind == "linear" else hidden_size
        self.vision_projector, self.text_projector = (
            nn.Linear(hidden_size, self.output_size) if kind == "linear" else nn.Identity() for _ in range(2)
        )
        self.temperature = nn.Parameter(torch.tensor(INITIAL_TEMPERATURE))

    def forward(self) -> torch.Tensor:
        """The temperature, a scalar; by a call, so that an engine that shards parameters knows that it is read."""
        return self.temperature.clone()

    def embed_images(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (..., hidden_size) to normalized float32 (..., output_size)."""
        return functional.normalize(self.vision_projector(hidden_states).float(), dim=-1)

    def embed_texts(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Map (..., hidden_size) to normalized float32 (..., output_size)."""
        return functional.normalize(self.text_projector(hidden_states).float(), dim=-1)


def within_range(temperature: torch.Tensor) -> torch.Tensor:
    """A temperature kept within its range; for use after each optimizer step."""
    return temperature.clamp(*TEMPERATURE_RANGE)


def save_heads(heads: HaclHeads, path: Path) -> None:
    """Write the heads as safetensors."""
    tensors = {name: tensor.detach().contiguous() for name, tensor in heads.state_dict().items()}
    # One entry: safetensors writes several in an order that differs from process to process.
    settings = json.dumps({"hidden_size": heads.hidden_size, "kind": heads.kind})
    save_file(tensors, path, metadata={METADATA_NAME: settings})


def load_heads(path: Path) -> HaclHeads:
    """Read heads that `save_heads` wrote.

    Raises:
        ModelError: if the file is missing or holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:
            settings = json.loads((file.metadata() or {})[METADATA_NAME])
            heads = HaclHeads(settings["hidden_size"], settings["kind"])
            heads.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    except (OSError, SafetensorError, KeyError, ValueError, RuntimeError) as error:
        raise ModelError(
            f"{path} holds no HACL heads: {error}. Give heads.safetensors of a finetune output."
        ) from error
    return heads
