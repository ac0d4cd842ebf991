"""The ``shellv`` program: a verb for each stage, and commands beside them.

Only the chosen verb's module is imported, so that help answers at once.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import logging
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from shellv_core import __version__
from shellv_core.errors import ConfigError, Preempted, ShellVError
from shellv_core.stages import STAGE_NAMES
from shellv_core.training.processes import launched, leave_first_to_speak

STAGE_HELP = {
    "prepare_data": "make verified WebDataset shards and benchmarks from scenes or LLaVA-format data",
    "pretrain_projector": "compose the model and align its projector",
    "finetune": "LoRA finetuning with the HACL objective",
    "merge_lora": "merge an adapter into a model that plain transformers loads",
    "evaluate": "judge a model against its blind run and its baseline, with a report",
    "promote": "register a model and decide whether it becomes the champion",
    "deploy": "serve the champion and ask it one question",
}
COMMANDS = {
    "data": ("count, show or verify a data set", "shellv_core.data.data_command"),
    "model": ("build a model, convert or export a checkpoint", "shellv_core.models.model_command"),
    "estimate": ("estimate the memory that training takes, and what fits", "shellv_core.stages.estimate_command"),
    "score": ("score anyone's answer file for a benchmark", "shellv_core.evaluation.score_command"),
    "compare": ("compare two models' evaluations, or two answer files", "shellv_core.stages.compare_command"),
    "models": ("show registered models, and what a version was made from", "shellv_core.stages.models_command"),
    "rollback": ("let the champion before be champion again", "shellv_core.stages.rollback_command"),
    "serve": ("serve a model over HTTP, with a chat page", "shellv_core.serving.serve_command"),
    "key": ("make a key for a server that asks for keys", "shellv_core.serving.key_command"),
    "bench": ("measure a server's speed under load", "shellv_core.serving.bench.bench_command"),
    "calibrate": ("find what a model's hallucination view should mark", "shellv_core.stages.calibrate_command"),
    "votes": ("rate models by the arena's votes, or export these", "shellv_core.serving.votes_command"),
    "chat": ("talk with a model about an image in the terminal", "shellv_core.serving.chat_command"),
}
#: Names the settings' own defaults in the place of a preset: for settings that are given whole.
NO_PRESET = "none"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code.

    0: done. 1: failed. 2: wrong settings. 130: interrupted. 143: stopped by SIGTERM or SIGUSR1, run me again.
    Under torchrun the first process alone logs and prints the result.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    verb = next((each for each in arguments if not each.startswith("-")), None)
    try:
        options = _parser(verb).parse_args(arguments)
        if options.verb in STAGE_NAMES:
            return _run_stage_verb(options)
        from shellv_core.logs import setup_logging

        setup_logging()
        command = importlib.import_module(COMMANDS[options.verb][1])
        code = int(command.main(options))
        sys.stdout.flush()
        return code
    except ShellVError as error:
        leave_first_to_speak()
        print(f"shellv: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except Preempted as stop:
        leave_first_to_speak()
        print(f"shellv: {stop}", file=sys.stderr)
        return stop.CODE
    except KeyboardInterrupt:
        print("shellv: interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # Who read our output has seen enough; Python would complain once more as it ends.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


def _parser(verb: str | None) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="shellv", description="Train, judge and serve models that hallucinate less.")
    parser.add_argument("--version", action="version", version=f"shellv {__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True)
    for stage, text in STAGE_HELP.items():
        sub = verbs.add_parser(stage, help=text, formatter_class=argparse.RawDescriptionHelpFormatter)
        if stage == verb:
            _add_stage_arguments(sub, stage)
    for name, (text, module) in COMMANDS.items():
        sub = verbs.add_parser(name, help=text)
        if name == verb:
            importlib.import_module(module).add_arguments(sub)
    return parser


def _add_stage_arguments(parser: argparse.ArgumentParser, stage: str) -> None:
    from shellv_core.stages.presets import PRESETS

    parser.add_argument(
        "--preset",
        default="nano",
        metavar="NAME",
        help=f"start from: {', '.join(PRESETS)}, or {NO_PRESET}",
    )
    parser.add_argument("--config", metavar="FILE", help="YAML file with settings that differ from the preset's")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="single settings: training.max_steps=9")
    parser.description = STAGE_HELP[stage]
    parser.epilog = "settings and their defaults before the preset:\n" + "\n".join(
        _describe_fields(_config_class(stage))
    )


def _config_class(stage: str) -> Any:
    module = importlib.import_module(f"shellv_core.stages.{stage}")
    return getattr(module, "".join(part.capitalize() for part in stage.split("_")) + "Config")


def _describe_fields(config_class: Any, prefix: str = "") -> Iterator[str]:
    from pydantic import BaseModel

    for name, field in config_class.model_fields.items():
        default = None if field.is_required() else field.get_default(call_default_factory=True)
        if isinstance(default, BaseModel):
            yield from _describe_fields(type(default), f"{prefix}{name}.")
        else:
            yield f"  {prefix}{name}={'' if default is None else default}"


def _run_stage_verb(options: argparse.Namespace) -> int:
    from pathlib import Path

    from shellv_core.config import apply_overrides, merge_values, read_yaml
    from shellv_core.logs import setup_logging
    from shellv_core.stages.presets import stage_config, stage_module

    first = launched().first
    setup_logging(logging.INFO if first else logging.WARNING)
    none = options.preset == NO_PRESET
    config = _config_class(options.verb)() if none else stage_config(options.preset, options.verb)
    if options.config:
        config = merge_values(config, read_yaml(Path(options.config)))
    config = apply_overrides(config, options.overrides)
    # Standard output carries the result alone; some libraries log there.
    with contextlib.redirect_stdout(sys.stderr), _storage_for(config):
        result = stage_module(options.verb).run(config)
    if first:
        print(result.model_dump_json(indent=1))
    return 0


def _storage_for(config: Any) -> contextlib.AbstractContextManager[Any]:
    from shellv_core.storage.seaweedfs import embedded_s3, external_s3_configured

    uses_s3 = '"s3://' in config.model_dump_json()
    return embedded_s3() if uses_s3 and not external_s3_configured() else contextlib.nullcontext()


if __name__ == "__main__":
    sys.exit(main())
