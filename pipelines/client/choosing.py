"""Which pipeline goes to a server and how its runs are set: the flags that several commands share."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from pipelines.compile import DEFAULT_PROFILE, PIPELINES

if TYPE_CHECKING:
    from pipelines.client.compiled import CompiledPipeline
    from pipelines.client.runs import RunSettings

EXPERIMENT = "KF_PIPELINES_DEFAULT_EXPERIMENT_NAME"
LOCAL_REGISTRY = "localhost/"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that choose a pipeline."""
    parser.add_argument("pipeline", metavar="PIPELINE", help=f"one of {', '.join(PIPELINES)}")
    parser.add_argument(
        "--profile",
        metavar="NAME",
        default=DEFAULT_PROFILE,
        help=f"a cluster: one of pipelines/profiles, or a YAML file ({DEFAULT_PROFILE})",
    )
    parser.add_argument("--locked", action="store_true", help="images by the digests that `make images` wrote down")
    parser.add_argument("--no-cache", action="store_true", help="run every task, whatever was computed before")


def add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags that say how a pipeline runs."""
    parser.add_argument("values", metavar="name=value", nargs="*", help="parameters of the pipeline")
    parser.add_argument("--params", metavar="FILE.yaml", type=Path, help="parameters from a file; name=value wins")
    parser.add_argument("--experiment", metavar="NAME", help=f"experiment of the runs ({EXPERIMENT}, or shellv)")
    parser.add_argument("--service-account", metavar="NAME", default="", help="service account of the tasks")
    parser.add_argument("--pipeline-root", metavar="URI", default="", help="folder of the artifacts")
    parser.add_argument("--mlflow-experiment", metavar="NAME", default="", help="experiment of the server's MLflow")


def chosen(options: argparse.Namespace) -> CompiledPipeline:
    """The pipeline that the flags choose, compiled now."""
    from components.images import LOCK_PATH
    from pipelines.client.compiled import compiled

    pipeline = compiled(options.pipeline, options.profile, LOCK_PATH if options.locked else None)
    local = sorted(each for each in pipeline.images if each.startswith(LOCAL_REGISTRY))
    if local:
        print(
            f"note: {', '.join(local)}: only a cluster whose nodes have these images can run this; push them"
            " to a registry, named by SHELLV_REGISTRY.",
            file=sys.stderr,
        )
    return pipeline.without_cache() if options.no_cache else pipeline


def run_settings(options: argparse.Namespace, pipeline: CompiledPipeline) -> RunSettings:
    """How the flags set a run of `pipeline`; a `ConfigError` for what does not fit it."""
    from pipelines.client.parameters import gather
    from pipelines.client.runs import RunSettings

    return RunSettings(
        experiment=options.experiment or os.environ.get(EXPERIMENT) or "shellv",
        parameters=gather(pipeline.parameters, options.params, options.values),
        service_account=options.service_account,
        pipeline_root=options.pipeline_root,
        mlflow_experiment=options.mlflow_experiment,
    )
