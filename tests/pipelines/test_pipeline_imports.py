"""Compiling and help are light: at module scope, nothing is imported that loads models, stages or services."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).resolve().parents[2]
LIGHT = {"kfp", "components", "pipelines"}
#: What all but the components themselves may import too.
LIBRARY = {"pydantic", "shellv_core", *(f"shellv_core.{name}" for name in ("config", "errors", "logs", "storage"))}
#: What talks to a server, or runs containers, is imported by its commands' actions, and by no pipeline.
ACTIONS = [REPOSITORY / "pipelines" / name for name in ("client", "contained")]
FILES = sorted(
    path
    for folder in ("components", "pipelines")
    for path in (REPOSITORY / folder).rglob("*.py")
    if not set(ACTIONS) & set(path.parents)
)
HEAVY = ("torch", "transformers", "mlflow", "boto3", "kfp", "kubernetes", "pydantic")


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
    allowed = set() if path.name == "component.py" else LIBRARY
    heavy = {
        name
        for name in module_scope_imports(path)
        if name not in allowed and name.split(".")[0] not in LIGHT | sys.stdlib_module_names
    }
    assert not heavy


def test_help_imports_nothing_heavy() -> None:
    program = (
        "import sys\nfrom pipelines.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        f"print([name for name in {HEAVY!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
