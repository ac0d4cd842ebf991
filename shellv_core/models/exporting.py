"""Model directories that transformers loads become upstream's formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft import LoraConfig as PeftLoraConfig
from transformers import AutoTokenizer, Starcoder2Config

from shellv_core.config import nearest
from shellv_core.errors import ModelError
from shellv_core.models import upstream
from shellv_core.models.checkpoints import (
    ADAPTER_FILES,
    PROJECTOR_FILE,
    SELECT_STRATEGIES,
    START_END_TOKENS,
    TOWER_DIRECTORY,
    TRAINABLES_FILE,
    copy_tokenizer,
    family_of,
    find_format,
    float_dtype,
    new_directory,
    read_adapter,
    read_json,
    read_stock,
    read_text,
    read_upstream_text,
    write_generation_config,
    write_json,
)
from shellv_core.models.codeshell import codeshell_config, codeshell_weights
from shellv_core.models.upstream import PROJECTOR, TOWER, Family, Parts
from shellv_core.models.weights import Weights, in_memory, rows, write_pickle, write_weights

#: (hidden size, patch size, image size) -> the tower that upstream loads by this name.
OPENAI_TOWERS = {
    (1024, 14, 336): "openai/clip-vit-large-patch14-336",
    (1024, 14, 224): "openai/clip-vit-large-patch14",
    (768, 16, 224): "openai/clip-vit-base-patch16",
    (768, 32, 224): "openai/clip-vit-base-patch32",
}
VOCABULARY_MATRICES = ("model.embed_tokens.weight", "lm_head.weight")


@dataclass(frozen=True)
class UpstreamModel:
    """A stock model in upstream's terms; `config` is the content of its config.json."""

    source: Path
    family: Family
    config: dict[str, Any]
    parts: Parts
    stock: Any


def export(source: Path, output: Path, form: str, base: Path | None = None) -> str:
    """Write `source`, a directory that transformers loads, in one of upstream's formats.

    Args:
        form: ``codeshell`` (from a Starcoder2 language model); ``llava`` or ``shellv`` (a whole checkpoint, after the
            type of the language model); ``mm_projector`` (the projector's file); ``delta`` (the difference to the
            language model `base`); ``lora`` (`source` is an adapter as finetune writes it, `base` the LLaVA model that
            it belongs to).

    Returns:
        What was made, a sentence for people.

    Raises:
        ModelError: if the format cannot hold the model.
        OutputNotEmptyError: if `output` holds something.
    """
    writers = {
        "codeshell": lambda directory, _: _write_codeshell(source, directory),
        "llava": lambda directory, _: _write_checkpoint(source, directory, form),
        "shellv": lambda directory, _: _write_checkpoint(source, directory, form),
        "mm_projector": lambda directory, _: _write_projector(source, directory),
        "lora": lambda directory, base: _write_adapter(source, directory, base),
        "delta": lambda directory, base: _write_delta(source, directory, base),
    }
    if form not in writers:
        raise ModelError(f"format {form!r} is unknown; {nearest(form, writers)}")
    if base is None and form in ("lora", "delta"):
        owner = "LLaVA model that the adapter is for" if form == "lora" else "language model to take the difference to"
        raise ModelError(f"format {form!r} needs the {owner}; give it with --base DIR.")
    if base is not None and form not in ("lora", "delta"):
        raise ModelError(f"format {form!r} has nothing to do with --base {base}; leave it out.")
    with new_directory(output) as directory:
        writers[form](directory, base)
    return f"wrote {output} in the format {form!r}."


def _write_codeshell(source: Path, directory: Path) -> None:
    config, weights = read_text(find_format(source))
    if not isinstance(config, Starcoder2Config):
        raise ModelError(f"{source} is a {config.model_type!r}; a 'starcoder2' is what CodeShell becomes.")
    content = codeshell_config(config)
    write_json(directory / "config.json", content)
    write_generation_config(directory, content, source)
    copy_tokenizer(source, directory)
    write_weights(codeshell_weights(weights, config), directory)


def _write_checkpoint(source: Path, directory: Path, form: str) -> None:
    model = _read(source)
    if model.family.name != form:
        raise ModelError(
            f"{source} has a {model.stock.text_config.model_type!r} language model, which is of the format"
            f" {model.family.name!r}, not {form!r}."
        )
    _write(model, directory, upstream.put_together(model.parts, model.family))


def _write_delta(source: Path, directory: Path, base: Path) -> None:
    model = _read(source)
    target = upstream.put_together(model.parts, model.family)
    _write(model, directory, upstream.make_delta(target, read_upstream_text(base), source))


def _write(model: UpstreamModel, directory: Path, weights: Weights) -> None:
    write_json(directory / "config.json", model.config)
    copy_tokenizer(model.source, directory)
    write_generation_config(directory, model.config)
    if model.config["mm_vision_tower"] == TOWER_DIRECTORY:
        model.stock.vision_config.save_pretrained(directory / TOWER_DIRECTORY)
        pixels = read_json(model.source / "processor_config.json").get("image_processor", {})
        kept = {name: pixels[name] for name in ("image_mean", "image_std", "size", "crop_size") if name in pixels}
        write_json(directory / TOWER_DIRECTORY / "preprocessor_config.json", kept)
    write_weights(weights, directory)


def _write_projector(source: Path, directory: Path) -> None:
    model = _read(source)
    prefix = model.family.prefix
    weights = {f"{prefix}mm_projector.{name}": tensor for name, tensor in model.parts.projector.items()}
    if model.config["mm_use_im_start_end"]:
        tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True)
        embeddings = {"llava": "model.embed_tokens.weight", "shellv": "transformer.wte.weight"}[model.family.name]
        picked = model.parts.text[embeddings].read()[tokenizer.convert_tokens_to_ids(list(START_END_TOKENS))]
        weights[f"{prefix}embed_tokens.weight"] = in_memory(picked)
    write_json(directory / "config.json", model.config)
    write_pickle(weights, directory / PROJECTOR_FILE)


def _write_adapter(source: Path, directory: Path, base: Path) -> None:
    model, adapter = _read(base), read_adapter(source)
    rank, alpha = adapter.config["r"], adapter.config["lora_alpha"]
    pairs = upstream.upstream_adapter(adapter.pairs, model.family, model.stock.text_config, rank)
    fused = sorted({module.rpartition(".")[2] for module, (a, _) in pairs.items() if a.shape[0] != rank})
    is_rslora = bool(adapter.config.get("use_rslora"))
    PeftLoraConfig(
        r=rank,
        lora_alpha=alpha,
        lora_dropout=adapter.config.get("lora_dropout", 0.0),
        use_rslora=is_rslora,
        # Three adapters in one keep their factor.
        rank_pattern=dict.fromkeys(fused, 3 * rank),
        alpha_pattern=dict.fromkeys(fused, alpha * (3**0.5 if is_rslora else 3)),
        target_modules=_targets(list(pairs), model.stock.text_config.num_hidden_layers),
        base_model_name_or_path=base.name,
        task_type="CAUSAL_LM",
        inference_mode=True,
    ).save_pretrained(str(directory))
    write_weights(upstream.tensor_weights(upstream.lora_tensors(pairs)), directory, file_name=ADAPTER_FILES[0])
    projector = model.parts.projector
    if adapter.saved:
        saved = {name.rpartition("multi_modal_projector.")[2]: tensor for name, tensor in adapter.saved.items()}
        projector, _ = upstream.upstream_projector(upstream.tensor_weights(saved), model.stock.projector_hidden_act)
    prefix = f"base_model.model.{model.family.prefix}mm_projector."
    write_pickle({prefix + name: tensor for name, tensor in projector.items()}, directory / TRAINABLES_FILE)
    write_json(directory / "config.json", model.config)


def _targets(modules: list[str], num_layers: int) -> list[str]:
    """Names for PEFT's target_modules: the short ones where each stands for all layers, else those of the modules."""
    short = [".".join(module.split(".")[-2:]) for module in modules]
    whole = all(short.count(name) == num_layers for name in short)
    return sorted(set(short)) if whole else sorted(modules)


def _read(path: Path) -> UpstreamModel:
    config, weights = read_stock(path)
    family = family_of(config.text_config)
    if family is None or config.vision_config.model_type not in ("clip_vision_model", "siglip_vision_model"):
        raise ModelError(
            f"{path} joins {config.vision_config.model_type!r} and {config.text_config.model_type!r}; LLaVA-1.5 has"
            " CLIP and 'llama', Shell-V CLIP and 'starcoder2'."
        )
    text, vocab_size = upstream.text_of_stock(weights), config.text_config.vocab_size
    if config.image_token_id == vocab_size - 1:
        # Upstream's model has no row for the image token, which came last.
        vocab_size -= 1
        text |= {name: rows(text[name], 0, vocab_size) for name in VOCABULARY_MATRICES if name in text}
    projector, kind = upstream.upstream_projector(
        upstream.part_of_stock(weights, PROJECTOR), config.projector_hidden_act
    )
    if config.text_config.model_type == "starcoder2":
        text = codeshell_weights(text, config.text_config)
    parts = Parts(text, projector, upstream.part_of_stock(weights, TOWER), ())
    content = {
        **_text_content(config.text_config),
        **_settings(config, path),
        "vocab_size": vocab_size,
        "architectures": [family.architecture],
        "model_type": family.model_type,
        "torch_dtype": str(float_dtype(weights)).removeprefix("torch."),
        "mm_projector_type": kind,
    }
    return UpstreamModel(path, family, content, parts, config)


def _settings(config: Any, path: Path) -> dict[str, Any]:
    features = {strategy: name for name, strategy in SELECT_STRATEGIES.items()}
    pixels = read_json(path / "processor_config.json", optional=True).get("image_processor", {})
    template = path / "chat_template.jinja"
    return {
        "use_mm_proj": True,
        "mm_hidden_size": config.vision_config.hidden_size,
        "mm_vision_tower": _tower_name(config),
        "mm_vision_select_layer": config.vision_feature_layer,
        "mm_vision_select_feature": features[config.vision_feature_select_strategy],
        "mm_use_im_start_end": template.is_file() and START_END_TOKENS[0] in template.read_text(encoding="utf-8"),
        "mm_use_im_patch_token": False,
        "image_aspect_ratio": "pad" if pixels.get("do_pad") else "square",
    }


def _tower_name(config: Any) -> str:
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        return TOWER_DIRECTORY
    return OPENAI_TOWERS.get((vision.hidden_size, vision.patch_size, vision.image_size), TOWER_DIRECTORY)


def _text_content(config: Any) -> dict[str, Any]:
    if isinstance(config, Starcoder2Config):
        return codeshell_config(config)
    content: dict[str, Any] = config.to_dict()
    content.pop("dtype", None)
    rope = content.pop("rope_parameters", None) or {}
    scaling = {name: value for name, value in rope.items() if name not in ("rope_type", "rope_theta")}
    kind = rope.get("rope_type", "default")
    # As transformers spelled it in upstream's time.
    content["rope_theta"] = rope.get("rope_theta", 10000.0)
    content["rope_scaling"] = None if kind == "default" else {"type": kind, **scaling}
    return content
