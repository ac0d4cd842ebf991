"""Upstream's checkpoints become model directories that transformers loads.

Weights stream from file to file (`weights`); an output directory appears under its name only when it is complete.
"""

from __future__ import annotations

import importlib.util
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig as PeftLoraConfig
from transformers import (
    AutoTokenizer,
    CLIPVisionConfig,
    GenerationConfig,
    LlavaConfig,
    PreTrainedConfig,
    PreTrainedTokenizerBase,
    SiglipVisionConfig,
)
from transformers.image_utils import IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD, OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from shellv_core.errors import ModelError
from shellv_core.logs import get_logger
from shellv_core.models import upstream
from shellv_core.models.checkpoints import (
    ADAPTER_FILES,
    DEFAULT_SETTINGS,
    PROJECTOR_FILE,
    SELECT_STRATEGIES,
    START_END_TOKENS,
    TOWER_DIRECTORY,
    TRAINABLES_FILE,
    Found,
    copy_tokenizer,
    family_of,
    find_format,
    float_dtype,
    new_directory,
    read_adapter,
    read_json,
    read_llama_config,
    read_stock,
    read_text,
    read_upstream_text,
    require_text,
    stock_shapes,
    write_generation_config,
)
from shellv_core.models.codeshell import is_codeshell_config, to_starcoder2
from shellv_core.models.config import IMAGE_END, IMAGE_START
from shellv_core.models.gguf import write_from_gguf
from shellv_core.models.processor import ImageInput, make_processor, prepare_tokenizer, stop_ids
from shellv_core.models.upstream import FAMILIES, PROJECTOR, TEXT, TOWER, Family
from shellv_core.models.weights import (
    Weights,
    has_weights,
    in_memory,
    load_pickle,
    read_weights,
    require,
    write_weights,
)
from shellv_core.templates import IMAGE_TOKEN, Template, template_named, template_of

logger = get_logger(__name__)

#: All OpenAI CLIP towers have heads of this size.
CLIP_HEAD_SIZE = 64
PATCH_TOKEN = "<im_patch>"  # noqa: S105
TOWER_CONFIGS: dict[str, type[PreTrainedConfig]] = {
    "clip": CLIPVisionConfig,
    "clip_vision_model": CLIPVisionConfig,
    "siglip": SiglipVisionConfig,
    "siglip_vision_model": SiglipVisionConfig,
}
#: Tensors of a whole CLIP or SigLIP that are no part of its vision tower, and buffers of the tower.
NOT_OF_TOWER = re.compile(
    r"text_model\..*|logit_scale|logit_bias|visual_projection\.weight|text_projection\.weight|.*\.position_ids"
)
#: A key of mm_projector.bin or non_lora_trainables.bin.
TRAINABLE = re.compile(r"(?:base_model\.(?:model\.)?)?(?:model|transformer)\.(.+)")


@dataclass
class Tower:
    """A vision tower: its config, weights by the names of its module (none: they come from elsewhere), its input."""

    config: Any
    weights: Weights
    mean: list[float]
    std: list[float]


@dataclass
class Draft:
    """A LLaVA model in the making.

    Attributes:
        source: where its tokenizer is.
        weights: by the names of stock modules; the tower's are apart.
        settings: upstream's, see `DEFAULT_SETTINGS`.
        activation: of the projector.
        projector_type: what the config says of it, if anything.
        new_rows: rows of the word embeddings that come with the projector: (2, hidden size) for the start and end
            tokens, or all of them.
    """

    source: Path
    family: Family | None
    text_config: Any
    weights: Weights
    tower: Tower | None = None
    settings: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT_SETTINGS))
    activation: str = "gelu"
    projector_type: str | None = None
    new_rows: torch.Tensor | None = None


def convert(
    source: Path,
    output: Path,
    base: Path | None = None,
    vision_tower: Path | None = None,
    template: str | None = None,
    delta: bool = False,
    keep_adapter: bool = False,
) -> str:
    """Convert `source`, of any format that `find_format` knows, to a directory that transformers loads.

    A CodeShell language model becomes a ``Starcoder2ForCausalLM``, a GGUF file the language model that it names,
    everything else a ``LlavaForConditionalGeneration`` with its processor.

    Args:
        base: the language model or LLaVA model to which a projector, an adapter or a delta belongs.
        vision_tower: directory of a CLIP or SigLIP model, for its config, and for its weights where `source` has none.
        template: the conversation template, by name; None takes the one of the model's family.
        delta: `source` holds the difference to `base`.
        keep_adapter: write ``base/`` and ``adapter/`` for PEFT in place of the merged model.

    Returns:
        What was found and made, a sentence for people.

    Raises:
        ConfigError: if there is no such template.
        ModelError: if anything is missing, unexpected, of a wrong shape, or unsafe to read. Nothing is written then.
        OutputNotEmptyError: if `output` holds something.
    """
    wanted = None if template is None else template_named(template)
    found = find_format(source)
    logger.info(found.description)
    is_text = (found.format == "codeshell" and not delta) or found.format == "gguf"
    _refuse_unused(
        found,
        {
            "--base": is_text and base is not None,
            "--vision-tower": is_text and vision_tower is not None,
            "--delta": delta and found.format in ("mm_projector", "lora", "stock", "gguf"),
            "--keep-adapter": keep_adapter and found.format != "lora",
            "--template": found.format == "gguf" and template is not None,
        },
    )
    made = "LlavaForConditionalGeneration"
    with new_directory(output) as directory:
        if found.format in ("stock", "language_model") and not delta:
            raise ModelError(f"{found.description}, which transformers loads as it is; there is nothing to convert.")
        if found.format == "gguf":
            made = write_from_gguf(found.path, directory)
        elif is_text:
            _write_text(found, directory, wanted or template_named("codeshell_chat"))
            made = "Starcoder2ForCausalLM"
        elif found.format == "lora" and keep_adapter:
            draft = _draft_of_base(_needed(found, base), vision_tower)
            _take_settings(draft, found.config)
            _take_trainables_of(draft, found.path)
            _write_stock(draft, directory / "base", wanted, found)
            _write_adapter(draft, found, directory / "adapter")
            made += " in base/ and its adapter in adapter/"
        else:
            _write_stock(_draft(found, base, vision_tower, delta), directory, wanted, found)
    return f"{found.description}; wrote {output}, a {made}."


def _refuse_unused(found: Found, given: dict[str, bool]) -> None:
    unused = [option for option, is_unused in given.items() if is_unused]
    if unused:
        raise ModelError(f"{found.description}, for which {' and '.join(unused)} means nothing; leave it out.")


def _needed(found: Found, base: Path | None) -> Path:
    if base is None:
        raise ModelError(f"{found.description}; give the model that it belongs to with --base DIR.")
    return base


def _write_text(found: Found, directory: Path, template: Template) -> None:
    config, weights = to_starcoder2(found.config, read_weights(found.path), found.path)
    config.dtype = float_dtype(weights)
    config.save_pretrained(directory)
    write_generation_config(directory, config.to_dict(), found.path)
    tokenizer = _load_tokenizer(found.path, directory)
    if tokenizer is None:
        logger.warning(f"{found.path} has no tokenizer to carry over; put tokenizer.json and the like into {directory}")
    else:
        tokenizer.chat_template = template.bound(tokenizer).chat_template()
        tokenizer.save_pretrained(directory)
    write_weights(weights, directory)


def _load_tokenizer(source: Path, directory: Path) -> PreTrainedTokenizerBase | None:
    """The tokenizer in `source`, read beside the new config in `directory`: transformers looks at both."""
    if not copy_tokenizer(source, directory):
        return None
    is_sentence_piece = (source / "tokenizer.model").is_file() and not (source / "tokenizer.json").is_file()
    if is_sentence_piece and importlib.util.find_spec("sentencepiece") is None:
        raise ModelError(
            f"{source} has its tokenizer as tokenizer.model alone, which only sentencepiece reads; install it (pip"
            " install sentencepiece==0.2.1), or put the tokenizer.json of the same tokenizer there."
        )
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise ModelError(f"cannot read the tokenizer in {source}: {str(error).splitlines()[0]}") from error
    return tokenizer


def _draft(found: Found, base: Path | None, vision_tower: Path | None, delta: bool) -> Draft:
    if delta:
        target = upstream.apply_delta(read_weights(found.path), read_upstream_text(_needed(found, base)), found.path)
        family = FAMILIES["shellv" if is_codeshell_config(found.config) else "llava"]
        return _draft_of_checkpoint(found, target, family, vision_tower)
    if found.format in FAMILIES:
        if base is not None:
            raise ModelError(
                f"{found.description}, which is complete and takes no --base. If it holds the difference to that base,"
                " say so with --delta."
            )
        return _draft_of_checkpoint(found, read_weights(found.path), FAMILIES[found.format], vision_tower)
    draft = _draft_of_base(_needed(found, base), vision_tower)
    _take_settings(draft, found.config)
    if found.format == "mm_projector":
        _take_trainables(draft, found.path)
    else:
        _take_trainables_of(draft, found.path)
        _merge_adapter(draft, found.path)
    return draft


def _draft_of_base(path: Path, vision_tower: Path | None) -> Draft:
    """The model that a projector or an adapter belongs to: a language model, or a whole LLaVA model of any layout."""
    found = find_format(path)
    logger.info(found.description)
    if found.format in FAMILIES:
        return _draft_of_checkpoint(found, read_weights(path), FAMILIES[found.format], vision_tower)
    if found.format == "stock":
        _refuse_unused(found, {"--vision-tower": vision_tower is not None})
        return _draft_of_stock(path)
    config, weights = read_text(found)
    draft = Draft(path, family_of(config), config, upstream.text_module_names(weights))
    draft.tower = None if vision_tower is None else _read_tower(vision_tower)
    return draft


def _draft_of_checkpoint(found: Found, weights: Weights, family: Family, vision_tower: Path | None) -> Draft:
    path, parts = found.path, upstream.take_apart(weights, family)
    if parts.left_out:
        logger.info(f"left out {len(parts.left_out)} tensors that only training needs, such as {parts.left_out[0]}")
    config: Any
    if family.name == "shellv":
        config, text = to_starcoder2(found.config, parts.text, path)
    else:
        config, text = read_llama_config(found.config), parts.text
        require_text(text, config, path)
    draft = Draft(path, family, config, upstream.text_module_names(text))
    _take_settings(draft, found.config)
    _take_projector(draft, parts.projector, path)
    draft.tower = _tower_of_checkpoint(found, parts.tower, vision_tower)
    return draft


def _draft_of_stock(path: Path) -> Draft:
    config, weights = read_stock(path)
    pixels = read_json(path / "processor_config.json", optional=True).get("image_processor", {})
    mean, std = pixels.get("image_mean", OPENAI_CLIP_MEAN), pixels.get("image_std", OPENAI_CLIP_STD)
    tower = Tower(config.vision_config, upstream.part_of_stock(weights, TOWER), list(mean), list(std))
    rest = {name: tensor for name, tensor in weights.items() if not name.startswith(TOWER)}
    draft = Draft(path, family_of(config.text_config), config.text_config, rest, tower)
    features = {strategy: name for name, strategy in SELECT_STRATEGIES.items()}
    draft.settings |= {
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": features[config.vision_feature_select_strategy],
        "image_aspect_ratio": "pad" if pixels.get("do_pad", True) else "square",
    }
    draft.activation = config.projector_hidden_act
    return draft


def _take_settings(draft: Draft, config: dict[str, Any]) -> None:
    if not config:
        logger.info(f"no config.json there; taking LLaVA-1.5's settings: {draft.settings}")
    draft.settings |= {name: config[name] for name in DEFAULT_SETTINGS if config.get(name) is not None}
    draft.projector_type = config.get("mm_projector_type", draft.projector_type)


def _take_projector(draft: Draft, projector: Weights, where: object) -> None:
    stock, kind = upstream.stock_projector(projector, where)
    if draft.projector_type not in (None, kind):
        raise ModelError(
            f"the keys of the projector in {where} are those of {kind!r}, but its config.json says"
            f" mm_projector_type={draft.projector_type!r}; put the config of its training there."
        )
    draft.activation = "gelu" if kind == "mlp2x_gelu" else "linear"
    draft.weights |= {PROJECTOR + name: tensor for name, tensor in stock.items()}


def _take_trainables_of(draft: Draft, adapter: Path) -> None:
    if (adapter / TRAINABLES_FILE).is_file():
        _take_trainables(draft, adapter / TRAINABLES_FILE)
    elif not any(name.startswith(PROJECTOR) for name in draft.weights):
        raise ModelError(
            f"{adapter} has no {TRAINABLES_FILE}, and its base no projector. LLaVA writes the file at the end of"
            " training only; an intermediate checkpoint lacks it."
        )


def _take_trainables(draft: Draft, path: Path) -> None:
    """Take over what upstream saves beside a frozen language model: the projector, and rows of the embeddings."""
    tensors = load_pickle(path)
    projector: Weights = {}
    unexpected = []
    for name, tensor in tensors.items():
        match = TRAINABLE.fullmatch(name)
        inner = match[1] if match else ""
        if inner.startswith("mm_projector."):
            projector[inner.removeprefix("mm_projector.")] = in_memory(tensor)
        elif inner in ("embed_tokens.weight", "embed_in.weight", "wte.weight"):
            draft.new_rows = tensor
        elif not upstream.LEFT_OUT.fullmatch(f"model.{inner}"):
            unexpected.append(name)
    if unexpected:
        raise ModelError(
            f"{path} holds {len(unexpected)} tensors beside a projector and embedding rows: {unexpected[:5]}. It is no"
            f" {PROJECTOR_FILE} or {TRAINABLES_FILE} of LLaVA or Shell-V."
        )
    _take_projector(draft, projector, path)


def _merge_adapter(draft: Draft, path: Path) -> None:
    adapter = read_adapter(path)
    family = _family(draft)
    for module, pair in adapter.pairs.items():
        scale = upstream.adapter_scale(adapter.config, module)
        stock = upstream.stock_adapter({module: pair}, family, draft.text_config, adapter.config["r"])
        for target, (a, b) in stock.items():
            weight = draft.weights.get(f"{target}.weight")
            if weight is None or weight.shape != (b.shape[0], a.shape[1]):
                raise ModelError(
                    f"the adapter in {path} changes {module} by ({b.shape[0]}, {a.shape[1]}), but the base has"
                    f" {'no such module' if weight is None else weight.shape}. Give the base that it was trained on."
                )
            draft.weights[f"{target}.weight"] = upstream.adapted(weight, a, b, scale)


def _family(draft: Draft) -> Family:
    if draft.family is None:
        raise ModelError(
            f"{draft.source} is a {draft.text_config.model_type!r}; LLaVA-1.5 has 'llama' and Shell-V CodeShell as"
            " language model."
        )
    return draft.family


def _write_adapter(draft: Draft, found: Found, directory: Path) -> None:
    """Write the adapter for the stock model of `draft`, its projector beside it, as finetune has it."""
    adapter = read_adapter(found.path)
    pairs = upstream.stock_adapter(adapter.pairs, _family(draft), draft.text_config, adapter.config["r"])
    odd = [name for name, (a, _) in pairs.items() if not name.startswith(TEXT) or a.shape[0] != adapter.config["r"]]
    if odd:
        raise ModelError(
            f"the adapter in {found.path} changes {odd[0]} outside the language model, or in another rank than"
            f" {adapter.config['r']}; merge it, without --keep-adapter."
        )
    config = PeftLoraConfig(
        r=adapter.config["r"],
        lora_alpha=adapter.config["lora_alpha"],
        lora_dropout=adapter.config.get("lora_dropout", 0.0),
        use_rslora=adapter.config.get("use_rslora", False),
        # In full, as the vision tower has modules of the same last name.
        target_modules=sorted(pairs),
        modules_to_save=[PROJECTOR.split(".")[1]],
        base_model_name_or_path="base",
        inference_mode=True,
    )
    directory.mkdir()
    config.save_pretrained(str(directory))
    projector = {f"base_model.model.{name}": t for name, t in draft.weights.items() if name.startswith(PROJECTOR)}
    write_weights(
        {**upstream.tensor_weights(upstream.lora_tensors(pairs)), **projector}, directory, file_name=ADAPTER_FILES[0]
    )


def _read_tower(path: Path) -> Tower:
    config = read_json(path / "config.json")
    kind = config.get("model_type")
    if kind not in TOWER_CONFIGS:
        raise ModelError(f"{path} has model_type={kind!r}; a vision tower is one of {', '.join(TOWER_CONFIGS)}.")
    values = {k: v for k, v in config.get("vision_config", config).items() if k not in ("architectures", "model_type")}
    weights = read_weights(path) if has_weights(path) else {}
    weights = {name.removeprefix("vision_model."): t for name, t in weights.items() if not NOT_OF_TOWER.fullmatch(name)}
    is_siglip = TOWER_CONFIGS[kind] is SiglipVisionConfig
    means = (IMAGENET_STANDARD_MEAN, IMAGENET_STANDARD_STD) if is_siglip else (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD)
    pixels = read_json(path / "preprocessor_config.json", optional=True)
    mean, std = pixels.get("image_mean", means[0]), pixels.get("image_std", means[1])
    return Tower(TOWER_CONFIGS[kind].from_dict(values), weights, list(mean), list(std))


def _tower_of_checkpoint(found: Found, weights: Weights, given: Path | None) -> Tower:
    """The tower of a whole checkpoint; tensors in the checkpoint go before those of the given directory."""
    name = str(found.config.get("mm_vision_tower"))
    if given is None and name == TOWER_DIRECTORY and (found.path / TOWER_DIRECTORY / "config.json").is_file():
        given = found.path / TOWER_DIRECTORY
    if given is not None:
        tower = _read_tower(given)
        tower.weights = weights or tower.weights
        return tower
    if not weights or not name.startswith("openai/clip-vit-"):
        raise ModelError(
            f"{found.path} has {'a' if weights else 'no'} vision tower (mm_vision_tower={name!r}), and no config of it;"
            " give the directory of that model with --vision-tower DIR."
        )
    return Tower(_clip_config(weights, found.path), weights, list(OPENAI_CLIP_MEAN), list(OPENAI_CLIP_STD))


def _clip_config(weights: Weights, path: Path) -> CLIPVisionConfig:
    """The config of an OpenAI CLIP vision tower, which its shapes give."""
    try:
        patches = weights["embeddings.patch_embedding.weight"].shape
        positions = weights["embeddings.position_embedding.weight"].shape[0]
        inner = weights["encoder.layers.0.mlp.fc1.weight"].shape[0]
    except KeyError as error:
        raise ModelError(f"the vision tower in {path} lacks {error}; give a whole one with --vision-tower.") from None
    layers = {int(match[1]) for name in weights if (match := re.match(r"encoder\.layers\.(\d+)\.", name))}
    return CLIPVisionConfig(
        hidden_size=patches[0],
        intermediate_size=inner,
        num_hidden_layers=len(layers),
        num_attention_heads=patches[0] // CLIP_HEAD_SIZE,
        patch_size=patches[-1],
        image_size=patches[-1] * round((positions - 1) ** 0.5),
    )


def _write_stock(draft: Draft, directory: Path, wanted: Template | None, found: Found) -> None:
    tower = draft.tower
    if tower is None or not tower.weights:
        raise ModelError(f"{found.description}, without a vision tower; give one with --vision-tower DIR.")
    template = _template(draft, wanted)
    directory.mkdir(exist_ok=True)
    tokenizer = _tokenizer(draft, template, directory)
    weights = _with_rows(draft, tokenizer)
    config = _stock_config(draft, tower, float_dtype(weights), tokenizer)
    weights |= {TOWER + name: tensor for name, tensor in tower.weights.items()}
    require(weights, stock_shapes(config), found.path)
    config.save_pretrained(directory)
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=stop_ids(tokenizer, template),
        pad_token_id=tokenizer.pad_token_id,
    ).save_pretrained(directory)
    image = ImageInput(
        size=config.vision_config.image_size,
        patch_size=config.vision_config.patch_size,
        mean=tower.mean,
        std=tower.std,
        select_strategy=config.vision_feature_select_strategy,
        has_class_token=_has_class_token(tower.config),
        pad=draft.settings["image_aspect_ratio"] == "pad",
    )
    make_processor(tokenizer, template, image).save_pretrained(directory)
    write_weights(upstream.stock_file_names(weights), directory)


def _template(draft: Draft, wanted: Template | None) -> Template:
    template = wanted or _recorded_template(draft.source)
    if template is None and draft.family is not None:
        template = template_named(draft.family.template)
    if template is None:
        raise ModelError(f"{draft.source} does not say how conversations are written; give --template NAME.")
    if draft.settings["mm_use_im_start_end"]:
        template = replace(template, image_open=IMAGE_START, image_close=IMAGE_END)
    return template


@dataclass(frozen=True)
class _Recorded:
    chat_template: str


def _recorded_template(path: Path) -> Template | None:
    """The template of a LLaVA directory of this project; a language model's own says nothing of pictures."""
    file = path / "chat_template.jinja"
    if not file.is_file() or not (path / "processor_config.json").is_file():
        return None
    return template_of(_Recorded(file.read_text(encoding="utf-8")))


def _tokenizer(draft: Draft, template: Template, directory: Path) -> PreTrainedTokenizerBase:
    """The tokenizer with upstream's tokens in upstream's order, then those of the template."""
    draft.text_config.save_pretrained(directory)
    tokenizer = _load_tokenizer(draft.source, directory)
    if tokenizer is None:
        raise ModelError(f"{draft.source} has no tokenizer; put its files (tokenizer.json ...) beside the weights.")
    added = [PATCH_TOKEN] if draft.settings["mm_use_im_patch_token"] else []
    added += START_END_TOKENS if draft.settings["mm_use_im_start_end"] else []
    tokenizer.add_tokens(added, special_tokens=True)
    prepare_tokenizer(tokenizer, template)
    return tokenizer


def _with_rows(draft: Draft, tokenizer: PreTrainedTokenizerBase) -> Weights:
    """The weights with a row for each token; start and end tokens get the trained rows where there are any."""
    weights = dict(draft.weights)
    embeddings, head = f"{TEXT}embed_tokens.weight", "lm_head.weight"
    added = max(0, len(tokenizer) - draft.text_config.vocab_size)
    for name in (embeddings, head):
        if added and name in weights:
            weights[name] = upstream.averaged_rows(weights[name], added)
    draft.text_config.vocab_size += added
    if draft.new_rows is None:
        return weights
    count, (num_rows, hidden) = len(draft.new_rows), weights[embeddings].shape
    if draft.new_rows.shape[1:] != (hidden,) or count > num_rows:
        raise ModelError(
            f"the embedding rows beside the projector are {tuple(draft.new_rows.shape)}; (2, {hidden}) or at most"
            f" ({num_rows}, {hidden}) is expected."
        )
    indices = list(range(count))
    if count == len(START_END_TOKENS):
        if not draft.settings["mm_use_im_start_end"]:
            raise ModelError(
                f"the projector's file brings rows for {' and '.join(START_END_TOKENS)}, but no config.json beside it"
                " says mm_use_im_start_end=true; put the one of its training there."
            )
        indices = [_token_id(tokenizer, token) for token in START_END_TOKENS]
    weights[embeddings] = upstream.replaced_rows(weights[embeddings], indices, draft.new_rows)
    return weights


def _stock_config(draft: Draft, tower: Tower, dtype: torch.dtype, tokenizer: PreTrainedTokenizerBase) -> Any:
    feature = draft.settings["mm_vision_select_feature"]
    if feature not in SELECT_STRATEGIES:
        raise ModelError(f"mm_vision_select_feature={feature!r}; known are {', '.join(SELECT_STRATEGIES)}.")
    # Without a class token there is none to leave out.
    strategy: Any = SELECT_STRATEGIES[feature] if _has_class_token(tower.config) else "full"
    patches = (tower.config.image_size // tower.config.patch_size) ** 2
    return LlavaConfig(
        vision_config=tower.config.to_dict(),
        text_config=draft.text_config.to_dict(),
        image_token_index=_token_id(tokenizer, IMAGE_TOKEN),
        image_seq_length=patches + int(strategy == "full" and _has_class_token(tower.config)),
        projector_hidden_act=draft.activation,
        vision_feature_layer=draft.settings["mm_vision_select_layer"],
        vision_feature_select_strategy=strategy,
        tie_word_embeddings=draft.text_config.tie_word_embeddings,
        architectures=["LlavaForConditionalGeneration"],
        dtype=dtype,
    )


def _has_class_token(config: Any) -> bool:
    return config.model_type == "clip_vision_model"


def _token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    found: Any = tokenizer.convert_tokens_to_ids(token)
    return int(found)
