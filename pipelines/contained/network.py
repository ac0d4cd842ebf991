"""A network that only the containers of a run and this machine are on."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pipelines.contained.hardening import hardened

OWNER_LABEL = "dev.shellv.owner"


@dataclass(frozen=True)
class RunNetwork:
    """Its name, and the address at which its containers reach this machine."""

    name: str
    gateway: str


@contextlib.contextmanager
def run_network(client: Any, image: str) -> Iterator[RunNetwork]:
    """Make a network, and remove it with all containers that are still on it; those of runs that were killed, too.

    Args:
        image: of the container that keeps it up: podman makes a network's bridge, and with it the gateway's address,
            only for as long as a container is on it.
    """
    for left in client.networks.list(filters={"label": OWNER_LABEL}):
        left.reload()
        if not _alive(int(left.attrs["Labels"][OWNER_LABEL])):
            _remove(client, left)
    network = client.networks.create(f"shellv-{os.getpid()}", driver="bridge", labels={OWNER_LABEL: str(os.getpid())})
    try:
        client.containers.run(image, ["sleep", "infinity"], network=network.name, detach=True, **hardened())
        network.reload()
        yield RunNetwork(network.name, network.attrs["IPAM"]["Config"][0]["Gateway"])
    finally:
        _remove(client, network)


def _remove(client: Any, network: Any) -> None:
    for container in client.containers.list(all=True, filters={"network": network.name}):
        container.remove(force=True)
    network.remove()


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
