"""Compile pipelines and components to the YAML that a cluster takes; and what of it is committed."""

from __future__ import annotations

import ast
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

if TYPE_CHECKING:
    from pipelines.definition import Definition

COMPILED_FOLDER = Path(__file__).parent / "compiled"
PIPELINES = ("shellv", "shellv-align", "shellv-evaluate", "shellv-data")
DEFAULT_PROFILE = "cpu"
#: (pipeline, profile) of the files that are committed: what runs on this machine, and what a cluster gets.
COMMITTED = (*((name, DEFAULT_PROFILE) for name in PIPELINES), ("shellv", "a100-80"))
DEFAULT_OF_CONTAINER = re.compile(r"^(#    \w+: \w+ \[Default: )([\[{].*)\]$", re.MULTILINE)


def definition(name: str) -> Definition:
    """The pipeline called `name`, one of `PIPELINES`.

    Raises:
        ConfigError: if there is none, with the nearest name.
    """
    from pipelines.align import SHELLV_ALIGN
    from pipelines.data import SHELLV_DATA
    from pipelines.judge import SHELLV_EVALUATE
    from pipelines.shellv import SHELLV
    from shellv_core.config import nearest
    from shellv_core.errors import ConfigError

    known = {each.name: each for each in (SHELLV, SHELLV_ALIGN, SHELLV_EVALUATE, SHELLV_DATA)}
    if name not in known:
        raise ConfigError(f"unknown pipeline {name!r}; {nearest(name, known)}")
    return known[name]


def compiled_yaml(name: str, profile: str = DEFAULT_PROFILE, lock: Path | None = None) -> str:
    """Pipeline `name` for a cluster, byte for byte the same for the same source, profile, registry, tag and lock file.

    Args:
        profile: name of one of ``pipelines/profiles``, or the path of a YAML file.
        lock: lock file whose digests name the images; None names them by registry and tag.

    Raises:
        ConfigError: if there is no such pipeline or profile, or the lock file lacks an image.
    """
    from pipelines.profile import read_profile

    return compiled_definition(definition(name), read_profile(profile), lock)


def compiled_definition(found: Definition, profile: Any, lock: Path | None = None) -> str:
    """As `compiled_yaml`, for a pipeline that has no name here."""
    built = found.build(profile)
    _add_literals(built.pipeline_spec)
    return _text(built, lock)


def compiled_component(name: str) -> str:
    """Component `name` alone, for pipelines of others to load.

    Raises:
        ConfigError: if there is no such component.
    """
    from components.metadata import load

    return _text(load(name), None)


def committed_files() -> Iterator[tuple[Path, str]]:
    """Every file that is made from the source and committed, and what it should hold."""
    from components.metadata import FOLDER, component_names
    from components.readme import readme

    for name, profile in COMMITTED:
        yield compiled_path(name, profile), compiled_yaml(name, profile)
    for name in component_names():
        text = compiled_component(name)
        yield FOLDER / name / "component.yaml", text
        yield FOLDER / name / "README.md", readme(name, text)


def compiled_path(name: str, profile: str = DEFAULT_PROFILE, folder: Path = COMPILED_FOLDER) -> Path:
    """Where the compiled pipeline is kept."""
    return folder / (f"{name}.yaml" if profile == DEFAULT_PROFILE else f"{name}-{Path(profile).stem}.yaml")


def _text(built: Any, lock: Path | None) -> str:
    from kfp.compiler import Compiler

    from components.images import ImageName, image

    if lock is not None:
        locked = {image(name): image(name, lock) for name in get_args(ImageName)}
        for executor in built.pipeline_spec.deployment_spec["executors"].values():
            container = executor["container"]
            container["image"] = locked[container["image"]]
            for variable in container["env"]:
                variable["value"] = locked.get(variable["value"], variable["value"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "compiled.yaml"
        Compiler().compile(built, str(path))
        text = path.read_text(encoding="utf-8")
    # kfp's comments list a mapping's keys in an order of the moment.
    return DEFAULT_OF_CONTAINER.sub(
        lambda found: f"{found[1]}{json.dumps(ast.literal_eval(found[2]), sort_keys=True)}]", text
    )


def _add_literals(spec: Any) -> None:
    """The run form offers a drop-down for a parameter with literals, which the SDK cannot declare yet."""
    from pipelines.profile import DEPLOY_TARGETS
    from shellv_core.stages.presets import PRESETS

    parameters = spec.root.input_definitions.parameters
    for name, values in {"preset": PRESETS, "deploy_target": DEPLOY_TARGETS}.items():
        if name in parameters:
            for value in values:
                parameters[name].literals.add().string_value = value
