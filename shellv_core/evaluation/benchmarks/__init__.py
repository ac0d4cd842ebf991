"""The benchmarks by name. A module of this package lists what it has in `ENTRIES`, and adding one is adding a module.

All are pure and light: no torch, no numpy at import.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import lru_cache

from shellv_core.errors import EvaluationError
from shellv_core.evaluation.benchmark import Entry


@lru_cache(maxsize=1)
def registry() -> dict[str, Entry]:
    """Name -> entry of every benchmark, in order of their names."""
    modules = [importlib.import_module(f"{__name__}.{each.name}") for each in pkgutil.iter_modules(__path__)]
    entries = [entry for module in modules for entry in module.ENTRIES]
    return {entry.name: entry for entry in sorted(entries, key=lambda entry: entry.name)}


def find(name: str) -> Entry:
    """The benchmark of that name.

    Raises:
        EvaluationError: listing the names, if there is none.
    """
    try:
        return registry()[name]
    except KeyError:
        raise EvaluationError(f"there is no benchmark {name!r}; there are: {', '.join(registry())}.") from None
