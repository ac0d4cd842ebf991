"""llama.cpp's GGUF files become directories that transformers loads and saves again."""

from __future__ import annotations

import importlib.util
import struct
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from shellv_core.errors import ModelError

MAGIC = b"GGUF"


def is_gguf(path: Path) -> bool:
    """Whether the file `path` begins as a GGUF file does."""
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


def write_from_gguf(path: Path, directory: Path) -> str:
    """Write the language model in the GGUF file `path`, its weights as plain float32, with its tokenizer.

    Returns:
        The class of the model.

    Raises:
        ModelError: if the package gguf is missing, or the file cannot be read.
    """
    if importlib.util.find_spec("gguf") is None:
        raise ModelError(f"{path} is a GGUF file, which the package gguf reads; install the extra 'smollm2'.")
    found: Any
    try:
        found = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    except (OSError, ValueError, LookupError, NotImplementedError, struct.error) as error:
        raise ModelError(f"cannot read the GGUF file {path}: {error}") from error
    loaded, loading = found
    faults = {name: sorted(map(str, names)) for name, names in loading.items() if names}
    if faults:
        raise ModelError(f"the tensors of the GGUF file {path} are not those of a {type(loaded).__name__}: {faults}.")
    # transformers refuses to save what it has unpacked itself.
    config = loaded.config
    del config.quantization_config
    model: PreTrainedModel = type(loaded)(config)
    model.load_state_dict(loaded.state_dict())
    model.generation_config = loaded.generation_config
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return type(model).__name__
