"""What the project's images are."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from components.images import ImageName

FOLDER = Path(__file__).parent
REPOSITORY = FOLDER.parent


@dataclass(frozen=True)
class Image:
    """One image.

    Attributes:
        extras: those of the library whose packages are in it.
        with_kfp: whether it runs tasks of a pipeline; kfp is then in it without its dependencies, which only the
            compiler and the client need.
        accelerated: whether its Containerfile's own base is one for CUDA.
    """

    name: ImageName
    extras: tuple[str, ...]
    with_kfp: bool = True
    accelerated: bool = False

    @property
    def containerfile(self) -> Path:
        """How it is built."""
        return FOLDER / self.name / "Containerfile"

    @property
    def requirements(self) -> Path:
        """Its pinned packages."""
        return FOLDER / self.name / "requirements.txt"


IMAGES = {
    image.name: image
    for image in (
        Image("control", extras=("data", "cluster")),
        Image("train", extras=("data", "train", "cluster", "amber", "mmbench"), accelerated=True),
        Image("serve", extras=("serve",), with_kfp=False),
    )
}
