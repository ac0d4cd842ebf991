"""The commands of ``python -m pipelines``, one module each.

A module has ``add_parser(commands)``, which adds its parser to argparse's sub-parsers, and ``run(options) -> int``,
which returns the exit code. It imports what takes time inside ``run``, so that help answers at once.
"""

COMMANDS = (
    "compile",
    "component",
    "run",
    "run-containers",
    "upload",
    "submit",
    "schedule",
    "status",
    "wait",
    "terminate",
    "doctor",
    "manifests",
)
