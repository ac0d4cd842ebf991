"""The one place where container images get their names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal, get_args

from pydantic import Field

import shellv_core
from shellv_core.config import Config, build_config, read_yaml
from shellv_core.errors import ConfigError

DEFAULT_REGISTRY = "localhost"
#: What `make images` built last, by digest; not committed, since it differs from registry to registry.
LOCK_PATH = Path(__file__).parents[1] / "containers" / "images.lock.yaml"

#: Label of an image: `shellv_core.stages.runner.code_digest` of all the library's code in it.
CODE_LABEL = "dev.shellv.code-sha256"

ImageName = Literal["control", "train", "serve"]


class LockedImage(Config):
    """An image that was built: `reference` with its tag, and the digest of its manifest."""

    reference: str
    digest: str = Field(pattern=r"^sha256:[0-9a-f]{64}$")

    @property
    def pinned(self) -> str:
        """The reference by digest, which always means these very bytes."""
        repository = self.reference.rpartition(":")[0]
        return f"{repository}@{self.digest}"


class ImagesLock(Config):
    """The lock file: the images by name."""

    images: dict[ImageName, LockedImage]


def image(name: ImageName, lock: Path | None = None) -> str:
    """The reference of image `name`: by digest if there is a `lock` file, else by tag.

    ``SHELLV_REGISTRY`` and ``SHELLV_TAG`` override the registry and the tag, which is the library's version: the body
    of a component travels in the pipeline and the library in the image, so both must be of one version.

    Args:
        name: ``control`` for tasks that need no GPU library, ``train`` for those that load a model, ``serve`` for the
            server.
        lock: what `make images` has written, usually `LOCK_PATH`.

    Raises:
        ConfigError: if the lock file is missing, faulty or lacks an image.
    """
    if lock is not None:
        return read_lock(lock).images[name].pinned
    registry = os.environ.get("SHELLV_REGISTRY", DEFAULT_REGISTRY).rstrip("/")
    tag = os.environ.get("SHELLV_TAG", shellv_core.__version__)
    return f"{registry}/shellv-{name}:{tag}"


def read_lock(path: Path = LOCK_PATH) -> ImagesLock:
    """The images that `make images` built last.

    Raises:
        ConfigError: if the file is missing, faulty or lacks an image.
    """
    if not path.is_file():
        raise ConfigError(f"there is no {path}; run `make images`, which builds the images and writes it.")
    lock = build_config(ImagesLock, read_yaml(path))
    missing = [name for name in get_args(ImageName) if name not in lock.images]
    if missing:
        raise ConfigError(f"{path} lacks {', '.join(missing)}; run `make images` again.")
    return lock
