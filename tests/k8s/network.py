"""Who may talk to whom: NetworkPolicies as a cluster's network reads them."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field
from typing import Any

from tests.k8s.rendering import Manifest, of_kind, pods

NAMESPACE = "shellv"


@dataclass(frozen=True)
class Peer:
    """A pod of this or another namespace, or an address outside of the cluster."""

    labels: dict[str, str] = field(default_factory=dict)
    namespace: dict[str, str] = field(default_factory=lambda: {"kubernetes.io/metadata.name": NAMESPACE})
    ports: dict[str, int] = field(default_factory=dict)
    address: str | None = None

    @property
    def is_ours(self) -> bool:
        return self.address is None and self.namespace.get("kubernetes.io/metadata.name") == NAMESPACE


def peer_of(objects: list[Manifest], name: str) -> Peer:
    """The pods of the object that is called `name`."""
    for owner, labels, spec in pods(objects):
        if owner["metadata"]["name"] == name:
            ports = {
                port["name"]: port["containerPort"] for each in spec["containers"] for port in each.get("ports", [])
            }
            return Peer(labels, ports=ports)
    raise KeyError(name)


def may_talk(objects: list[Manifest], source: Peer, target: Peer, port: int, protocol: str = "TCP") -> bool:
    """Whether both ends allow a connection from `source` to `port` of `target`."""
    policies = of_kind(objects, "NetworkPolicy")
    leaves = not source.is_ours or _allows(policies, "Egress", source, target, target, port, protocol)
    return leaves and (not target.is_ours or _allows(policies, "Ingress", target, source, target, port, protocol))


def _allows(
    policies: list[Manifest], direction: str, subject: Peer, other: Peer, target: Peer, port: int, protocol: str
) -> bool:
    own = [
        each["spec"]
        for each in policies
        if direction in each["spec"]["policyTypes"] and _matches(each["spec"]["podSelector"], subject.labels)
    ]
    rules = [rule for spec in own for rule in spec.get(direction.lower(), [])]
    side = "to" if direction == "Egress" else "from"
    return not own or any(
        (side not in rule or any(_is_peer(each, other) for each in rule[side]))
        and ("ports" not in rule or any(_is_port(each, target, port, protocol) for each in rule["ports"]))
        for rule in rules
    )


def _is_peer(given: dict[str, Any], peer: Peer) -> bool:
    if "ipBlock" in given:
        if peer.address is None:
            return False
        address = ipaddress.ip_address(peer.address)
        block = given["ipBlock"]
        outside = [each for each in block.get("except", []) if address in ipaddress.ip_network(each)]
        return address in ipaddress.ip_network(block["cidr"]) and not outside
    if peer.address is not None:
        return False
    if "namespaceSelector" in given:
        if not _matches(given["namespaceSelector"], peer.namespace):
            return False
    elif not peer.is_ours:
        return False
    return _matches(given.get("podSelector", {}), peer.labels)


def _is_port(given: dict[str, Any], target: Peer, port: int, protocol: str) -> bool:
    number = target.ports.get(given["port"]) if isinstance(given["port"], str) else given["port"]
    return given.get("protocol", "TCP") == protocol and number == port


def _matches(selector: dict[str, Any], labels: dict[str, str]) -> bool:
    for key, value in selector.get("matchLabels", {}).items():
        if labels.get(key) != value:
            return False
    for each in selector.get("matchExpressions", []):
        value = labels.get(each["key"])
        if each["operator"] == "Exists" and value is None:
            return False
        if each["operator"] == "In" and value not in each["values"]:
            return False
        assert each["operator"] in ("Exists", "In")
    return True
