"""The project folder: everything that the project keeps on this machine, for the user to see and delete."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """The project folder: ``$SHELLV_HOME``, by default ``.shellv`` below the working directory (absolute path)."""
    return Path(os.environ.get("SHELLV_HOME", ".shellv")).absolute()
