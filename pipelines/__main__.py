"""``python -m pipelines compile [--check]`` and ``python -m pipelines run [key=value ...]``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from shellv_core.errors import ConfigError, ShellVError


def main(argv: Sequence[str] | None = None) -> int:
    """Run the program; returns its exit code: 0 done, 1 failed, 2 wrong settings, 130 interrupted."""
    options = _parser().parse_args(argv)
    try:
        return _compile(options) if options.command == "compile" else _run(options)
    except ShellVError as error:
        print(f"pipelines: {error}", file=sys.stderr)
        return 2 if isinstance(error, ConfigError) else 1
    except KeyboardInterrupt:
        print("pipelines: interrupted; the next run continues where this one stopped", file=sys.stderr)
        return 130


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m pipelines", description="Compile the pipeline, or run it here.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    compiling = commands.add_parser("compile", help="write the YAML files that Kubeflow Pipelines takes")
    compiling.add_argument("--check", action="store_true", help="only tell whether the committed files are current")
    running = commands.add_parser("run", help="run the whole pipeline on this machine")
    running.add_argument("--preset", default="nano", help="settings of all stages (nano)")
    running.add_argument("--root-uri", metavar="URI", help="folder of all outputs, s3:// or file://")
    running.add_argument("overrides", nargs="*", metavar="STAGE.key=value", help="single settings that differ")
    return parser


def _compile(options: argparse.Namespace) -> int:
    from pipelines.compile import PIPELINES, compiled_path, is_current, write

    if not options.check:
        for name in PIPELINES:
            print(write(name))
        return 0
    stale = [str(compiled_path(name)) for name in PIPELINES if not is_current(name)]
    if stale:
        raise ShellVError(f"{', '.join(stale)}: not what the source compiles to; run `python -m pipelines compile`.")
    return 0


def _run(options: argparse.Namespace) -> int:
    from pipelines.local import run
    from pipelines.summary import summary
    from shellv_core.logs import setup_logging

    setup_logging()
    print(summary(run(options.preset, options.overrides, options.root_uri)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
