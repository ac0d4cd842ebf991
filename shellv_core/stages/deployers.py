"""The places to deploy to: a child process, a server elsewhere that follows the alias, a Kubernetes cluster."""

from __future__ import annotations

import contextlib
import time
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol

from shellv_core.logs import get_logger

if TYPE_CHECKING:
    from collections.abc import Iterator

    from shellv_core.endpoint.client import EndpointClient
    from shellv_core.stages.deploy import DeployConfig

logger = get_logger(__name__)

POLL_SECONDS, LOG_INTERVAL_SECONDS = 1.0, 10.0
#: Between a rollout's end and the Service's first answer from the new pods.
SERVICE_SECONDS = 60.0
SERVICE_PORT = 8000


@dataclass(frozen=True)
class Champion:
    """The version to roll out.

    Attributes:
        alias: the reference that names it now, ``models:/NAME@ALIAS``.
        pinned: the reference that always names it, ``models:/NAME/VERSION``.
        version: its number.
        revision: SHA-256 over its files, which a server of it reports.
    """

    alias: str
    pinned: str
    version: str
    revision: str


@dataclass(frozen=True)
class Deployment:
    """A rolled-out model: who asks it, and facts about how it runs, for the record."""

    client: EndpointClient
    details: dict[str, Any] = field(default_factory=dict)


class Deployer(Protocol):
    """A way to roll a model out."""

    def __call__(self, config: DeployConfig, champion: Champion) -> AbstractContextManager[Deployment]:
        """Roll out `champion` and wait until it is ready.

        An error raised inside the context (a wrong answer) takes the deployment back.
        """
        ...


@contextlib.contextmanager
def _deploy_locally(config: DeployConfig, champion: Champion) -> Iterator[Deployment]:
    """A child process of this one; it goes with the stage unless it is to be kept."""
    from shellv_core.endpoint.client import EndpointClient
    from shellv_core.serving.local_server import local_server
    from shellv_core.storage import home

    log_path = home() / "logs" / "serve.log"
    with local_server(
        champion.alias, config.host, config.port, log_path, config.startup_timeout_seconds, config.keep_running
    ) as server:
        details = {"pid": server.pid, "stop": f"kill {server.pid}"} if config.keep_running else {}
        yield Deployment(EndpointClient(server.url), details)


@contextlib.contextmanager
def _await_service(config: DeployConfig, champion: Champion) -> Iterator[Deployment]:
    """A server elsewhere that takes up what the alias names; it is only waited for."""
    from shellv_core.endpoint.client import EndpointClient

    client = EndpointClient(config.url or "")
    _await_revision(client, champion, config.startup_timeout_seconds)
    yield Deployment(client)


@contextlib.contextmanager
def _deploy_to_kubernetes(config: DeployConfig, champion: Champion) -> Iterator[Deployment]:
    """A canary that is asked, then the stable Deployment, which goes back to what it had if anything fails."""
    from shellv_core.cluster.connection import Cluster
    from shellv_core.cluster.rollout import Version, rolled_out
    from shellv_core.endpoint.client import EndpointClient

    cluster = Cluster(config.namespace)

    def client(service: str) -> EndpointClient:
        address = cluster.service(service, SERVICE_PORT)
        return EndpointClient(address.url, address.token, tls=address.tls)

    def check(service: str) -> None:
        _await_revision(client(service), champion, SERVICE_SECONDS)

    version = Version(champion.pinned, champion.version)
    with rolled_out(cluster, config.deployment, version, config.startup_timeout_seconds, check) as service:
        details = {
            "url": client(config.deployment).url,
            "namespace": cluster.namespace,
            "deployment": config.deployment,
            "asked": service,
        }
        yield Deployment(client(service), details)


def _await_revision(client: EndpointClient, champion: Champion, timeout_seconds: float) -> None:
    """Return when a server is ready and serves `champion`.

    Raises:
        ServingError: if it does not in time, with what it serves instead.
    """
    import asyncio

    from shellv_core.endpoint.client import EndpointError
    from shellv_core.errors import ServingError

    deadline = time.monotonic() + timeout_seconds
    shown = 0.0
    while True:
        try:
            served = str(asyncio.run(client.model()).get("revision"))
            if served == champion.revision:
                asyncio.run(client.check_readiness())
                return
            state = f"it serves revision {served[:12]}"
        except EndpointError as error:
            state = str(error)
        left = deadline - time.monotonic()
        if left <= 0:
            raise ServingError(
                f"{client.url} did not take up {champion.alias} (version {champion.version}, revision"
                f" {champion.revision[:12]}) within {timeout_seconds:g} seconds: {state}. Look at its log, or raise"
                " startup_timeout_seconds if the model needs longer to load."
            )
        if time.monotonic() - shown > LOG_INTERVAL_SECONDS:
            shown = time.monotonic()
            logger.info(
                "deploy: waiting for %s to serve version %s, at most %.0f s more; %s",
                client.url, champion.version, left, state,
            )  # fmt: skip
        time.sleep(min(POLL_SECONDS, left))


DEPLOYERS: dict[str, Deployer] = {
    "local": _deploy_locally,
    "service": _await_service,
    "kubernetes": _deploy_to_kubernetes,
}
