"""``shellv model``: build models, and convert upstream's checkpoints to this project's form and back."""

from __future__ import annotations

import argparse
from pathlib import Path

EXPORT_FORMATS = ("codeshell", "llava", "shellv", "mm_projector", "lora", "delta")
_CONVERT = """\
What IN is follows from its config.json and the names of its tensors:

  CodeShell or Shell language model       -> Starcoder2ForCausalLM
  language model in a GGUF file           -> what its architecture is in transformers (LlamaForCausalLM, ...)
  whole LLaVA-1.5 or Shell-V checkpoint   -> LlavaForConditionalGeneration; --vision-tower where it has none
  the same as a delta                     -> the same; with --delta --base LANGUAGE_MODEL
  mm_projector.bin, alone or in a folder  -> the same; with --base LANGUAGE_MODEL --vision-tower DIR
  LoRA folder, non_lora_trainables.bin    -> the same, merged; with --base (and --vision-tower). With --keep-adapter
                                             OUT/base and OUT/adapter

Weights are read and written tensor by tensor. OUT appears when it is complete, or not at all."""
_EXPORT = """\
formats:
  codeshell     from a Starcoder2 language model
  llava         a whole LLaVA-1.5 checkpoint, from a LLaVA model with a LLaMA
  shellv        a whole Shell-V checkpoint, from a LLaVA model with a Starcoder2
  mm_projector  the projector's file alone, with start and end tokens' rows where there are any
  lora          IN is an adapter as finetune writes it, --base the LLaVA model that it belongs to
  delta         a whole checkpoint less the language model in --base, exact"""
_BUILD = """\
The settings are those of pretrain_projector's model, for example

  shellv model build OUT vision_tower.kind=clip vision_tower.pretrained=clip-vit-large-patch14-336 \\
    vision_tower.image_size=336 vision_tower.feature_layer=-2 vision_tower.select_strategy=default \\
    vision_tower.standardize=false language_model.pretrained=Shell-7B-starcoder2 \\
    tokenizer.pretrained=Shell-7B-starcoder2 template=shellv

Parts without `pretrained` start from random weights; the tokenizer must be given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the three verbs."""
    verbs = parser.add_subparsers(dest="model_verb", metavar="VERB", required=True)
    raw = argparse.RawDescriptionHelpFormatter
    build = verbs.add_parser(
        "build", help="compose a LLaVA model of a vision tower and a language model", epilog=_BUILD, formatter_class=raw
    )
    build.add_argument("output", type=Path, metavar="OUT", help="new directory")
    build.add_argument("overrides", nargs="*", metavar="key=value", help="settings that differ from the defaults")
    build.add_argument("--seed", type=int, default=0, help="of random weights (0)")
    convert = verbs.add_parser(
        "convert", help="make upstream's checkpoints loadable by transformers", epilog=_CONVERT, formatter_class=raw
    )
    export = verbs.add_parser("export", help="write upstream's formats", epilog=_EXPORT, formatter_class=raw)
    export.add_argument("--format", required=True, choices=EXPORT_FORMATS, help="see below")
    for sub in (convert, export):
        sub.add_argument("source", type=Path, metavar="IN", help="what to read")
        sub.add_argument("output", type=Path, metavar="OUT", help="new directory")
        sub.add_argument("--base", type=Path, metavar="DIR", help="the model that IN belongs to")
    convert.add_argument("--vision-tower", type=Path, metavar="DIR", help="a CLIP or SigLIP model")
    convert.add_argument("--template", metavar="NAME", help="conversation template (that of the model's family)")
    convert.add_argument("--delta", action="store_true", help="IN holds the difference to --base")
    convert.add_argument("--keep-adapter", action="store_true", help="do not merge a LoRA adapter")


def main(args: argparse.Namespace) -> int:
    """Run a verb; returns the exit code.

    Raises:
        ShellVError: if the model cannot be read, converted or written.
    """
    verbs = {"build": _build, "convert": _convert, "export": _export}
    print(verbs[args.model_verb](args))  # noqa: T201 - the command's answer
    return 0


def _build(args: argparse.Namespace) -> str:
    from shellv_core.config import apply_overrides
    from shellv_core.errors import ConfigError
    from shellv_core.models.config import ModelConfig

    config = apply_overrides(ModelConfig(), args.overrides)
    if config.tokenizer.pretrained is None:
        raise ConfigError(
            "a new tokenizer needs texts to learn from, which pretrain_projector has; give"
            " tokenizer.pretrained=DIR here."
        )
    from shellv_core.models.checkpoints import new_directory
    from shellv_core.models.compose import build_model, load_model, save_model

    with new_directory(args.output) as directory:
        model, processor = build_model(config, seed=args.seed)
        save_model(model, processor, directory)
        load_model(directory)
    return f"wrote {args.output}, a LlavaForConditionalGeneration with {model.num_parameters():,} parameters."


def _convert(args: argparse.Namespace) -> str:
    from shellv_core.models.importing import convert

    return convert(
        args.source,
        args.output,
        base=args.base,
        vision_tower=args.vision_tower,
        template=args.template,
        delta=args.delta,
        keep_adapter=args.keep_adapter,
    )


def _export(args: argparse.Namespace) -> str:
    from shellv_core.models.exporting import export

    return export(args.source, args.output, args.format, base=args.base)
