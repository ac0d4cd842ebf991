"""``python -m pipelines COMMAND``: compile the pipelines, run them here, and what else `pipelines.commands` lists."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence
from types import ModuleType

from pipelines.commands import COMMANDS
from shellv_core.errors import ConfigError, ShellVError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0 done, 1 failed, 2 wrong settings, 130 interrupted."""
    options = _options(argv)
    try:
        return int(_module(options.command).run(options))
    except ShellVError as error:
        print(f"pipelines: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("pipelines: interrupted; the next run continues where this one stopped", file=sys.stderr)
        return 130


def _options(argv: Sequence[str] | None) -> argparse.Namespace:
    """The parsed arguments; name=value may stand after flags too, where argparse itself takes no more of them."""
    parser = _parser()
    options, rest = parser.parse_known_args(argv)
    settings = getattr(options, "values", getattr(options, "overrides", None))
    if rest and (settings is None or any(each.startswith("-") or "=" not in each for each in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if settings is not None:
        settings.extend(rest)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines", description="Compile the pipelines, or run them.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in COMMANDS:
        _module(name).add_parser(commands)
    return parser


def _module(command: str) -> ModuleType:
    return importlib.import_module(f"pipelines.commands.{command.replace('-', '_')}")


if __name__ == "__main__":
    sys.exit(main())
