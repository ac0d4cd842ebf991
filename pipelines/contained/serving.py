"""The server of a run: a container that serves what the registry's alias names."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from pipelines.contained.hardening import hardened
from pipelines.contained.network import RunNetwork
from shellv_core.errors import TrackingError
from shellv_core.logs import get_logger

logger = get_logger(__name__)

NAME = "shellv-serve"
PORT = 8000
POLL_SECONDS = 2.0


class ServedChampion:
    """Starts the serving container once the alias names a version; from then on the server follows the alias itself.

    Args:
        model: name in the registry.
        log_path: gets the container's log when all is over.
    """

    def __init__(
        self, client: Any, image: str, network: RunNetwork, environment: Mapping[str, str], model: str, log_path: Path
    ) -> None:
        self._client, self._image, self._network = client, image, network
        self._environment, self._model, self._log_path = dict(environment), model, log_path
        self._container: Any = None
        self._ended = threading.Event()

    @contextlib.contextmanager
    def following(self) -> Iterator[str]:
        """Follow the alias in a thread of its own; yields the server's URL for the other containers."""
        thread = threading.Thread(target=self._follow, name=NAME, daemon=True)
        thread.start()
        try:
            yield f"http://{NAME}:{PORT}"
        finally:
            self._ended.set()
            thread.join()
            self._remove()

    def _follow(self) -> None:
        import docker

        from shellv_core.tracking.registry import CHAMPION, ModelRegistry

        registry = ModelRegistry(self._model)
        while not self._ended.wait(POLL_SECONDS):
            try:
                if self._container is not None:
                    self._container.reload()
                    if self._container.status == "exited":
                        said = self._container.logs(tail=5).decode(errors="replace").strip()
                        logger.warning("the serving container has ended:\n%s", said)
                        return
                elif registry.find(CHAMPION) is not None:
                    self._start(f"models:/{self._model}@{CHAMPION}")
            except TrackingError as error:
                # A registry that is busy is asked again.
                logger.debug("%s", error)
            except docker.errors.DockerException as error:
                logger.warning("the serving container does not start, and is tried again: %s", error)

    def _start(self, reference: str) -> None:
        self._container = self._client.containers.run(
            self._image,
            # Only the run's own containers and this machine are on the network.
            ["shellv", "serve", f"--model={reference}", "--host=0.0.0.0", f"--port={PORT}", "--open-to-all"],
            detach=True,
            name=f"{NAME}-{self._network.name}",
            network=self._network.name,
            networking_config={self._network.name: self._client.api.create_endpoint_config(aliases=[NAME])},
            environment=self._environment,
            **hardened(),
        )

    def _remove(self) -> None:
        if self._container is None:
            return
        self._log_path.write_bytes(self._container.logs())
        self._container.remove(force=True)
