"""Compiling is light: at module scope, components and the pipeline import nothing but kfp and the standard library."""

from __future__ import annotations

import ast
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LIGHT = {"kfp", "components", "pipelines"}
LIBRARY = {
    "components/images.py": {"shellv_core"},
    "pipelines/__main__.py": {"shellv_core.errors"},
    "pipelines/local.py": {"shellv_core.errors", "shellv_core.storage"},
    "pipelines/summary.py": {"shellv_core.storage"},
}
#: What talks to a server is imported by its commands' actions, and no pipeline.
CLIENT = REPOSITORY / "pipelines" / "client"
FILES = sorted(
    path
    for folder in ("components", "pipelines")
    for path in (REPOSITORY / folder).rglob("*.py")
    if CLIENT not in path.parents
)


def module_scope_imports(path: Path) -> set[str]:
    names = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names.add(node.module or "")
    return names


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.relative_to(REPOSITORY).as_posix())
def test_module_scope_imports(path: Path) -> None:
    allowed = LIBRARY.get(path.relative_to(REPOSITORY).as_posix(), set())
    heavy = {
        name
        for name in module_scope_imports(path)
        if name not in allowed and name.split(".")[0] not in LIGHT | sys.stdlib_module_names
    }
    assert not heavy
