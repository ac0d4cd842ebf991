"""What a workflow engine's task does before its stage: logging, and the check that library and pipeline fit."""

from __future__ import annotations

import os

import shellv_core
from shellv_core.errors import ConfigError
from shellv_core.logs import setup_logging

#: Set in every task when a pipeline is compiled: the version of the library that it was compiled with.
VERSION_VARIABLE = "SHELLV_PIPELINE_VERSION"
#: The pipeline run's id, from the pod's label ``pipeline/runid``; on one machine from who starts the run.
RUN_VARIABLE = "KFP_RUN_ID"
#: The image that the task runs in, set when a pipeline is compiled.
IMAGE_VARIABLE = "SHELLV_IMAGE"


def begin_task() -> None:
    """Set up logging and hold the library of this image against the one that the pipeline was compiled with.

    The body of a component travels in the pipeline and the library in the image, so that they may drift apart.

    Raises:
        ConfigError: if the versions differ.
    """
    setup_logging()
    compiled = os.environ.get(VERSION_VARIABLE)
    if compiled and compiled != shellv_core.__version__:
        where = os.environ.get(IMAGE_VARIABLE) or "this environment"
        raise ConfigError(
            f"{where} has version {shellv_core.__version__} of the library, but the pipeline was compiled with"
            f" {compiled}. Compile it again with this version, or build images of version {compiled}."
        )


def run_id() -> str:
    """The id of the pipeline run that this task belongs to; empty outside one."""
    return os.environ.get(RUN_VARIABLE, "")
