"""Checkpoints: what a directory holds, by its config.json and the names of its tensors, never by its path."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
)

from shellv_core.config import nearest
from shellv_core.errors import ModelError, OutputNotEmptyError
from shellv_core.models.codeshell import codeshell_weights, is_codeshell_config, to_starcoder2
from shellv_core.models.config import IMAGE_END, IMAGE_START
from shellv_core.models.gguf import is_gguf
from shellv_core.models.upstream import FAMILIES, LEFT_OUT, Adapter, Family, read_lora_pairs, stock_module_names
from shellv_core.models.weights import Weights, has_weights, read_weights, require

#: What `find_format` can say of a checkpoint.
FORMATS = {
    "codeshell": "a CodeShell language model",
    "language_model": "a language model of transformers",
    "llava": "a LLaVA-1.5 checkpoint",
    "shellv": "a Shell-V checkpoint",
    "stock": "a LlavaForConditionalGeneration directory",
    "mm_projector": "a projector alone (mm_projector.bin)",
    "lora": "a LoRA adapter",
    "gguf": "a GGUF file",
}
PROJECTOR_FILE, TRAINABLES_FILE = "mm_projector.bin", "non_lora_trainables.bin"
ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_FILES = ("adapter_model.safetensors", "adapter_model.bin")
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
)
#: The tower's own config in an exported checkpoint, where upstream knows no name for it.
TOWER_DIRECTORY = "vision_tower"
START_END_TOKENS = (IMAGE_START, IMAGE_END)
SELECT_STRATEGIES = {"patch": "default", "cls_patch": "full"}
#: LLaVA-1.5's settings where a checkpoint does not say: those of all its scripts.
DEFAULT_SETTINGS: dict[str, Any] = {
    "mm_vision_select_layer": -2,
    "mm_vision_select_feature": "patch",
    "image_aspect_ratio": "pad",
    "mm_use_im_start_end": False,
    "mm_use_im_patch_token": False,
}
#: Fields of a config that describe the whole checkpoint.
NOT_OF_TEXT = ("architectures", "model_type", "transformers_version")


@dataclass(frozen=True)
class Found:
    """A checkpoint, what it is, and the config.json in it or (for a projector's file) beside it."""

    path: Path
    format: str
    config: dict[str, Any]

    @property
    def description(self) -> str:
        """What was found, as the start of a sentence."""
        return f"{self.path} is {FORMATS[self.format]}"


@dataclass(frozen=True)
class AdapterFiles:
    """A LoRA adapter: its config, its matrices by module, and what is saved in full beside them, by PEFT's name."""

    config: dict[str, Any]
    pairs: Adapter
    saved: dict[str, torch.Tensor]


def find_format(path: Path) -> Found:
    """Say what `path`, a directory, a projector's file or a GGUF file, holds.

    Raises:
        ModelError: if it holds none of `FORMATS`.
    """
    if not path.exists():
        raise ModelError(f"{path} does not exist; give a checkpoint's directory, a {PROJECTOR_FILE}, or a GGUF file.")
    if path.is_file():
        if is_gguf(path):
            return Found(path, "gguf", {})
        return Found(path, "mm_projector", read_json(path.parent / "config.json", optional=True))
    config = read_json(path / "config.json", optional=True)
    if (path / ADAPTER_CONFIG).is_file():
        return Found(path, "lora", config)
    if not has_weights(path):
        if (path / PROJECTOR_FILE).is_file():
            return Found(path / PROJECTOR_FILE, "mm_projector", config)
        raise ModelError(
            f"{path} holds no checkpoint: no weights (model.safetensors, pytorch_model.bin or shards with an index), no"
            f" {PROJECTOR_FILE}, no {ADAPTER_CONFIG}."
        )
    if not config:
        raise ModelError(f"{path} has weights but no config.json; a checkpoint's settings cannot be guessed.")
    return Found(path, _format_of_keys(read_weights(path), config, path), config)


@contextlib.contextmanager
def new_directory(path: Path) -> Iterator[Path]:
    """A temporary directory beside `path` that takes its name when the block ends well, and is gone if it does not.

    Raises:
        OutputNotEmptyError: if `path` exists and is not an empty directory.
    """
    path = path.absolute()
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise OutputNotEmptyError(f"{path} exists and is not an empty directory; give a new one.")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".unfinished", dir=path.parent))
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error.strerror}.") from None
    try:
        unfinished.chmod(0o755)
        yield unfinished
        unfinished.replace(path)
    except OSError as error:
        raise ModelError(f"cannot write {path}: {error}.") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def read_json(path: Path, optional: bool = False) -> dict[str, Any]:
    """The mapping in a JSON file; empty where the file is `optional` and not there.

    Raises:
        ModelError: if it cannot be read or holds something else.
    """
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {path}: {error}.") from None
    if not isinstance(content, dict):
        raise ModelError(f"{path} holds {type(content).__name__}, but a mapping is expected.")
    return content


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write a mapping as JSON."""
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def family_of(text_config: Any) -> Family | None:
    """Upstream's code that has this language model; None where none has."""
    return next((each for each in FAMILIES.values() if each.text_model_type == text_config.model_type), None)


def read_text_config(config: dict[str, Any], path: Path) -> Any:
    """The config of a language model from its config.json.

    Raises:
        ModelError: if its model_type is unknown to transformers.
    """
    kind = str(config.get("model_type"))
    if kind not in CONFIG_MAPPING:
        raise ModelError(f"{path} has model_type={kind!r}, unknown to transformers; {nearest(kind, CONFIG_MAPPING)}")
    return CONFIG_MAPPING[kind].from_dict(config)


def read_llama_config(config: dict[str, Any]) -> LlamaConfig:
    """The language model's part of a LLaVA-1.5 config.json, which holds settings of vision and generation too."""
    known = {field.name for field in dataclasses.fields(LlamaConfig)} | {"rope_theta", "rope_scaling"}
    return LlamaConfig(**{name: value for name, value in config.items() if name in known - set(NOT_OF_TEXT)})


def require_text(weights: Weights, config: Any, path: Path) -> None:
    """Check that `weights` are those of the causal language model that `config` describes.

    Raises:
        ModelError: listing what is missing, unexpected or of another shape; or for a model whose names are unusual.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    if model.base_model_prefix != "model":
        raise ModelError(
            f"{path} is a {type(model).__name__}, whose weights cannot be placed by name; use `shellv model build`,"
            " which takes any causal language model."
        )
    expected = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings and "lm_head.weight" not in weights:
        expected.pop("lm_head.weight")
    require(weights, expected, path)


def read_text(found: Found) -> tuple[Any, Weights]:
    """A language model as transformers has it, CodeShell as Starcoder2.

    Raises:
        ModelError: if `found` is something else, or its weights are not those of its config.
    """
    weights = read_weights(found.path)
    if found.format == "codeshell":
        return to_starcoder2(found.config, weights, found.path)
    if found.format != "language_model":
        raise ModelError(f"{found.description}; a language model is expected.")
    config = read_text_config(found.config, found.path)
    weights = {name: tensor for name, tensor in weights.items() if not LEFT_OUT.fullmatch(name)}
    require_text(weights, config, found.path)
    return config, weights


def read_upstream_text(path: Path) -> Weights:
    """A language model's weights, derived buffers aside, under the names that upstream's checkpoints use."""
    config, weights = read_text(find_format(path))
    return codeshell_weights(weights, config) if config.model_type == "starcoder2" else weights


def read_stock(path: Path) -> tuple[Any, Weights]:
    """A stock model, the weights under the names of its modules.

    Raises:
        ModelError: if there is none, or its weights are not those of its config.
    """
    found = find_format(path)
    if found.format != "stock":
        raise ModelError(f"{found.description}; {FORMATS['stock']} is expected.")
    config: Any = LlavaConfig.from_dict(found.config)
    weights = stock_module_names(read_weights(path))
    if config.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    require(weights, stock_shapes(config), path)
    return config, weights


def stock_shapes(config: Any) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a stock model's weights."""
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(config)
    shapes = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    return shapes


def read_adapter(path: Path) -> AdapterFiles:
    """The LoRA adapter in `path`, PEFT's or upstream's.

    Raises:
        ModelError: if it is something other than plain LoRA.
    """
    config = read_json(path / ADAPTER_CONFIG)
    unsupported = [name for name in ("use_dora", "fan_in_fan_out", "lora_bias") if config.get(name)]
    if config.get("bias", "none") != "none":
        unsupported.append(f"bias={config['bias']!r}")
    if config.get("peft_type", "LORA") != "LORA" or unsupported:
        raise ModelError(
            f"{path / ADAPTER_CONFIG} has peft_type={config.get('peft_type')!r} and sets {unsupported or 'no more'};"
            " only plain LoRA without biases can be converted."
        )
    file = next((path / name for name in ADAPTER_FILES if (path / name).is_file()), None)
    if file is None:
        raise ModelError(f"{path} has no adapter weights: neither {' nor '.join(ADAPTER_FILES)} is there.")
    tensors = {name: tensor.read() for name, tensor in read_weights(file).items()}
    saved = {name: t for name, t in tensors.items() if ".multi_modal_projector." in name and ".lora_" not in name}
    pairs = read_lora_pairs({name: t for name, t in tensors.items() if name not in saved}, path)
    return AdapterFiles(config, pairs, saved)


def write_generation_config(directory: Path, config: Mapping[str, Any], source: Path | None = None) -> None:
    """Write the generation settings in `source`, if any, with the begin, end and padding ids of `config`."""
    # As JSON: transformers refuses to save combinations that upstream has, such as top_p without sampling.
    content = {} if source is None else read_json(source / "generation_config.json", optional=True)
    content |= {name: config.get(name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    write_json(directory / "generation_config.json", content)


def copy_tokenizer(source: Path, directory: Path) -> bool:
    """Copy a tokenizer's files; returns whether there were any."""
    names = [name for name in TOKENIZER_FILES if (source / name).is_file()]
    for name in names:
        shutil.copyfile(source / name, directory / name)
    return bool(names)


def float_dtype(weights: Weights) -> torch.dtype:
    """The type of the first tensor of real numbers."""
    return next((tensor.dtype for tensor in weights.values() if tensor.dtype.is_floating_point), torch.float32)


def _format_of_keys(weights: Weights, config: dict[str, Any], path: Path) -> str:
    for family in FAMILIES.values():
        if any(name.startswith(f"{family.prefix}mm_projector.") for name in weights):
            return family.name
    if any("multi_modal_projector." in name for name in weights):
        return "stock"
    if is_codeshell_config(config):
        return "codeshell"
    if config.get("model_type") in CONFIG_MAPPING:
        return "language_model"
    raise ModelError(
        f"{path} is of no known format: model_type={config.get('model_type')!r},"
        f" architectures={config.get('architectures')!r}, first tensors {list(weights)[:3]}. Known are"
        f" {', '.join(FORMATS.values())}."
    )
