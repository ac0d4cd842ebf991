"""The one place where container images get their names."""

from __future__ import annotations

import os
from typing import Literal

import shellv_core

DEFAULT_REGISTRY = "localhost"


def image(name: Literal["control", "train"]) -> str:
    """The reference of image `name`, fixed when the pipeline is compiled.

    ``SHELLV_REGISTRY`` and ``SHELLV_TAG`` override the registry and the tag, which is the library's version: the body
    of a component travels in the pipeline and the library in the image, so both must be of one version.

    Args:
        name: ``control`` for stages that need no GPU library, ``train`` for those that load a model.
    """
    registry = os.environ.get("SHELLV_REGISTRY", DEFAULT_REGISTRY).rstrip("/")
    tag = os.environ.get("SHELLV_TAG", shellv_core.__version__)
    return f"{registry}/shellv-{name}:{tag}"
