"""Real containers: an engine, a network and the images that `make images` has built."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from components.images import LOCK_PATH, ImageName, image
from pipelines.contained.engine import docker_api
from pipelines.contained.network import RunNetwork, run_network


def built(name: ImageName) -> str:
    """The reference of an image in the lock file."""
    return image(name, LOCK_PATH)


@pytest.fixture(scope="session")
def engine() -> Iterator[Any]:
    """A client of the Docker API."""
    with docker_api() as client:
        yield client


@pytest.fixture(scope="session")
def network(engine: Any) -> Iterator[RunNetwork]:
    """A network of the session's own."""
    with run_network(engine, built("control")) as made:
        yield made
