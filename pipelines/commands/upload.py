"""``python -m pipelines upload``: bring a pipeline to a Kubeflow Pipelines server, named by its content."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from pipelines.client import choosing, settings


def add_parser(commands: Any) -> None:
    """Add the command to argparse's sub-parsers."""
    parser = commands.add_parser("upload", help="bring a pipeline to a server, as a version named by its content")
    choosing.add_arguments(parser)
    parser.add_argument(
        "--manifests",
        metavar="FILE",
        type=Path,
        help="write Pipeline and PipelineVersion resources instead, for a repository that a cluster follows",
    )
    settings.add_arguments(parser)


def run(options: argparse.Namespace) -> int:
    """Upload the pipeline unless the server has it, or write it as Kubernetes resources."""
    from pipelines.client.connection import Server
    from pipelines.client.versions import upload

    pipeline = choosing.chosen(options)
    if options.manifests:
        options.manifests.write_text(pipeline.manifests(), encoding="utf-8")
        print(options.manifests)
        return 0
    version = upload(Server(settings.settings(options)), pipeline)
    print(f"{pipeline.name} {version.name}: {'uploaded' if version.is_new else 'already there'}")
    print(version.link)
    return 0
