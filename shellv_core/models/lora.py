"""LoRA adapters on the language model, beside a projector that is trained in full; and their merge."""

from __future__ import annotations

import contextlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from peft import PeftModel, get_peft_model, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import ModulesToSaveWrapper
from safetensors.torch import load_file
from torch import nn
from transformers import LlavaForConditionalGeneration

from shellv_core.errors import ModelError
from shellv_core.models.compose import load_model, save_model, stored_dtype
from shellv_core.models.config import LoraConfig

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"
PROJECTOR = "multi_modal_projector"


def add_lora(
    model: LlavaForConditionalGeneration, config: LoraConfig, train_projector: bool = True, seed: int = 0
) -> PeftModel:
    """Put adapters on every linear layer of the language model, in place; all else is frozen.

    The adapters start as zero, so the model answers as before. `seed` decides their random half; the caller's random
    state is left as it was.
    """
    names = sorted(
        {
            name.rpartition(".")[2]
            for name, module in model.model.language_model.named_modules()
            if isinstance(module, nn.Linear)
        }
    )
    peft_config = PeftLoraConfig(
        r=config.r,
        lora_alpha=config.alpha,
        lora_dropout=config.dropout,
        target_modules=rf".*\.language_model\..*\.({'|'.join(names)})",
        modules_to_save=[PROJECTOR] if train_projector else None,
        use_dora=config.dora,
    )
    module: Any
    for module in model.modules():
        # On some CPUs a 4-bit layer packs its weights for inference at the first pass without gradients, and then it
        # passes none on.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        adapted = get_peft_model(model, peft_config)
    if model.config.projector_hidden_act == "linear":
        # PEFT trains all of a module; see compose.projector_layers.
        for name, parameter in adapted.named_parameters():
            if f"{PROJECTOR}." in name and ".linear_2." in name:
                parameter.requires_grad_(False)
    return adapted


@contextlib.contextmanager
def without_adapters(model: nn.Module) -> Iterator[None]:
    """Within it, a model with adapters (and the modules trained beside them) computes what it did before it had them.

    Raises:
        ModelError: if it has none.
    """
    layers = [each for each in model.modules() if isinstance(each, BaseTunerLayer | ModulesToSaveWrapper)]
    if not layers:
        raise ModelError("the model has no adapters to leave out; add LoRA, or keep a frozen copy beside it.")
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


def save_adapter(model: PeftModel, directory: Path, base_model: str) -> None:
    """Write the adapter, with `base_model` as the name of the model that it belongs to."""
    model.peft_config["default"].base_model_name_or_path = base_model
    model.save_pretrained(str(directory))
    # A model card full of placeholders, which would break the byte-equality of reruns.
    (Path(directory) / "README.md").unlink(missing_ok=True)


def load_adapter(base: LlavaForConditionalGeneration | PeftModel, directory: Path, name: str = "default") -> PeftModel:
    """Put a saved adapter on `base`, every weight accounted for.

    Args:
        base: the model that it belongs to, or that model with other adapters.
        name: of the adapter, among those of one model.

    Raises:
        ModelError: if there is no adapter in `directory` or its weights do not fit `base`.
    """
    path = Path(directory)
    if not (path / ADAPTER_CONFIG).is_file() or not (path / ADAPTER_WEIGHTS).is_file():
        raise ModelError(f"{path} holds no adapter ({ADAPTER_CONFIG} and {ADAPTER_WEIGHTS}); give finetune's adapter/.")
    try:
        peft_config = PeftLoraConfig.from_pretrained(str(path))
        peft_config.inference_mode = True
        if isinstance(base, PeftModel):
            model = base
            model.add_adapter(name, peft_config)
        else:
            model = get_peft_model(base, peft_config, name)
        result: Any = set_peft_model_state_dict(model, load_file(path / ADAPTER_WEIGHTS), name)
    except (RuntimeError, ValueError) as error:
        raise ModelError(f"the adapter in {path} does not fit its base model: {error}") from error
    # Frozen base weights are missing by nature; of the adapter's own none may be.
    missing = [
        key for key in result.missing_keys if ("lora_" in key or "modules_to_save" in key) and f".{name}." in f"{key}."
    ]
    if result.unexpected_keys or missing:
        raise ModelError(
            f"the adapter in {path} does not fit its base model: unexpected {result.unexpected_keys}, missing"
            f" {missing}. Give the base model that it was trained on."
        )
    return model.eval()


def merge_adapter(base_directory: Path, adapter_directory: Path, output_directory: Path) -> None:
    """Fold an adapter into its base model and write the result as a model directory.

    A directory that is a whole model already, with no adapter to fold in, is copied as it is.

    Raises:
        ModelError: if either directory is not what it should be.
    """
    if is_merged(adapter_directory):
        shutil.copytree(adapter_directory, output_directory, dirs_exist_ok=True)
        return
    base, processor = load_model(base_directory)
    merged = load_adapter(base, adapter_directory).merge_and_unload(safe_merge=True)
    # Added in float32, written as the base is.
    save_model(merged, processor, output_directory, stored_dtype(base_directory))
    load_model(output_directory)


def is_merged(directory: Path) -> bool:
    """Whether `directory` is a whole model rather than an adapter."""
    return (Path(directory) / "config.json").is_file() and not (Path(directory) / ADAPTER_CONFIG).is_file()
