"""What the project's images are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from components.images import ImageName

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parent
CONTAINERFILE = FOLDER / "Containerfile"
PYTHON_BASE = "docker.io/library/python:3.11.14-slim-bookworm"
CUDA_BASE = "docker.io/nvidia/cuda:13.0.2-runtime-ubuntu24.04"


@dataclass(frozen=True)
class Image:
    """One image.

    Attributes:
        base: what it is built on where nobody says another.
        extras: those of the library whose packages are in it.
        with_kfp: whether it runs tasks of a pipeline; kfp is then in it without its dependencies, which only the
            compiler and the client need.
        target: the Containerfile's stage that it is.
    """

    name: ImageName
    base: str
    extras: tuple[str, ...]
    with_kfp: bool = True
    target: Literal["task", "server"] = "task"

    @property
    def requirements(self) -> Path:
        """Its pinned packages."""
        return FOLDER / "requirements" / f"{self.name}.txt"


IMAGES = {
    image.name: image
    for image in (
        # Preflight, data, promotion, deployment, cleanup: no task that needs a GPU's libraries.
        Image("control", PYTHON_BASE, extras=("data", "cluster")),
        # Training, merging, evaluation; also runs on CPUs, given PYTHON_BASE.
        Image("train", CUDA_BASE, extras=("data", "train", "cluster", "amber", "mmbench")),
        # `shellv serve`; for GPUs give CUDA_BASE.
        Image("serve", PYTHON_BASE, extras=("serve",), with_kfp=False, target="server"),
    )
}
