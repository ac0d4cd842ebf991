"""Compile the pipeline to the YAML that a cluster takes, and hold the committed file against the source."""

from __future__ import annotations

import tempfile
from pathlib import Path

COMPILED_PATH = Path(__file__).parent / "compiled" / "shellv.yaml"


def compiled_yaml() -> str:
    """The pipeline as YAML, byte for byte the same for the same source, registry and tag."""
    from kfp.compiler import Compiler

    from pipelines.shellv import shellv
    from shellv_core.stages.presets import PRESETS

    # The run form offers a drop-down for a parameter with literals, which the SDK cannot declare yet.
    literals = shellv.pipeline_spec.root.input_definitions.parameters["preset"].literals
    if not literals:
        for name in PRESETS:
            literals.add().string_value = name
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "shellv.yaml"
        Compiler().compile(shellv, str(path))
        return path.read_text(encoding="utf-8")


def is_current(path: Path = COMPILED_PATH) -> bool:
    """Whether the file at `path` is what the source compiles to now."""
    return path.is_file() and path.read_text(encoding="utf-8") == compiled_yaml()


def write(path: Path = COMPILED_PATH) -> None:
    """Write the compiled pipeline to `path`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(compiled_yaml(), encoding="utf-8")
