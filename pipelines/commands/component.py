"""``python -m pipelines component``: one component alone, as a pipeline of one task."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = commands.add_parser(
        "component",
        help="one component alone: as a pipeline of one task, or run here",
        description="Make a pipeline of one task, to upload and run on a cluster; or run it here with --run.",
    )
    parser.add_argument("name", help="a folder of components/")
    parser.add_argument("--run", nargs="*", metavar="key=value", help="run it on this machine with these inputs")
    parser.add_argument("--profile", default="cpu", metavar="NAME", help="the cluster that it is for (cpu)")
    parser.add_argument("--locked", action="store_true", help="name its image by the digest of the lock file")
    parser.add_argument("-o", "--output", metavar="FILE", type=Path, help="where the pipeline goes (standard output)")


def run(options: argparse.Namespace) -> int:
    """Write the pipeline, or run it and print what the task returned.

    Raises:
        ConfigError: if there is no such component or profile, or an input is wrong.
        TaskFailedError: if the task fails.
    """
    from components.images import LOCK_PATH
    from pipelines.compile import compiled_definition
    from pipelines.profile import read_profile
    from pipelines.single import arguments, single

    found = single(options.name)
    given = None if options.run is None else arguments(options.name, options.run)
    text = compiled_definition(found, read_profile(options.profile), LOCK_PATH if options.locked else None)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    elif given is None:
        print(text, end="")
    if given is not None:
        for value in _run(options.name, text, given).values():
            print(value)
    return 0


def _run(name: str, text: str, given: dict[str, Any]) -> dict[str, Any]:
    from components.metadata import load
    from pipelines.local import object_store, refuse_python3, run_tasks
    from shellv_core.logs import setup_logging

    setup_logging()
    refuse_python3([str(value) for value in given.values()])
    with object_store(given.get("root_uri")) as root:
        place = {"root_uri": root} if "root_uri" in load(name).component_spec.inputs else {}
        return run_tasks(text, {**given, **place})[0]
