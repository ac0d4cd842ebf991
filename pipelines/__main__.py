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
    options = _parser().parse_args(argv)
    try:
        return int(_module(options.command).run(options))
    except ShellVError as error:
        print(f"pipelines: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("pipelines: interrupted; the next run continues where this one stopped", file=sys.stderr)
        return 130


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
