"""Compile the pipelines to the YAML that a cluster takes, and hold the committed files against the source."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

COMPILED_FOLDER = Path(__file__).parent / "compiled"
PIPELINES = ("shellv", "shellv-data")


def pipeline(name: str) -> Any:
    """The pipeline called `name`, one of `PIPELINES`."""
    from pipelines.data import shellv_data
    from pipelines.shellv import shellv

    return {"shellv": shellv, "shellv-data": shellv_data}[name]


def compiled_path(name: str) -> Path:
    """Where the compiled pipeline is kept."""
    return COMPILED_FOLDER / f"{name}.yaml"


def compiled_yaml(name: str) -> str:
    """The pipeline as YAML, byte for byte the same for the same source, registry and tag."""
    from kfp.compiler import Compiler

    from shellv_core.stages.presets import PRESETS

    built = pipeline(name)
    # The run form offers a drop-down for a parameter with literals, which the SDK cannot declare yet.
    literals = built.pipeline_spec.root.input_definitions.parameters["preset"].literals
    if not literals:
        for preset in PRESETS:
            literals.add().string_value = preset
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "pipeline.yaml"
        Compiler().compile(built, str(path))
        return path.read_text(encoding="utf-8")


def is_current(name: str) -> bool:
    """Whether the committed file is what the source compiles to now."""
    path = compiled_path(name)
    return path.is_file() and path.read_text(encoding="utf-8") == compiled_yaml(name)


def write(name: str) -> Path:
    """Write the compiled pipeline; returns the file."""
    path = compiled_path(name)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(compiled_yaml(name), encoding="utf-8")
    return path
