"""What is known of a component beside its code: ``metadata.yaml`` in its folder, which placement and READMEs use."""

import functools
from pathlib import Path
from typing import Any, Literal

from shellv_core.config import Config, build_config, nearest, read_yaml
from shellv_core.errors import ConfigError

FOLDER = Path(__file__).parent
#: Tasks of one kind get the same time, disk and hardware from a cluster's profile.
Kind = Literal["check", "control", "data", "training", "merging", "evaluation"]


class Metadata(Config):
    """Facts about a component.

    Attributes:
        name: of the component and its folder.
        stability: alpha: its interface may change; beta: it changes with notice; stable: with a new major version.
        kind: of task that it makes.
        cached: whether Kubeflow Pipelines may take an earlier task's outputs: where all that counts is in its inputs.
        services: what it needs to reach.
        tags: words to find it by.
    """

    name: str
    stability: Literal["alpha", "beta", "stable"]
    kind: Kind
    cached: bool
    services: list[Literal["object store", "MLflow", "Kubernetes API"]]
    tags: list[str]


@functools.cache
def component_names() -> tuple[str, ...]:
    """All components, in alphabetical order."""
    return tuple(sorted(path.parent.name for path in FOLDER.glob("*/metadata.yaml")))


@functools.cache
def metadata(name: str) -> Metadata:
    """What is known of component `name`.

    Raises:
        ConfigError: if there is no such component, with the nearest name, or its file is wrong.
    """
    if name not in component_names():
        raise ConfigError(f"unknown component {name!r}; {nearest(name, component_names())}")
    return build_config(Metadata, read_yaml(FOLDER / name / "metadata.yaml"))


def load(name: str) -> Any:
    """Component `name`, as kfp knows it.

    Raises:
        ConfigError: if there is no such component.
    """
    import importlib

    metadata(name)
    return getattr(importlib.import_module(f"components.{name}.component"), name)
