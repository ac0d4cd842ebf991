"""What the code of this package asks of the Kubernetes API, for the role of the account that pipeline tasks run with.

Reaching a Service through the API server (``services/proxy``) is not among it: tasks reach Services by name, and only
who deploys from outside of the cluster needs it, with credentials of their own.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Permission:
    """Verbs on a resource of an API group; "" is the core group."""

    group: str
    resource: str
    verbs: frozenset[str]


PERMISSIONS = (
    Permission("trainer.kubeflow.org", "trainjobs", frozenset({"create", "get", "list", "watch", "delete"})),
    Permission("", "pods", frozenset({"list"})),
    Permission("", "pods/log", frozenset({"get"})),
    Permission("", "events", frozenset({"list"})),
    Permission("apps", "deployments", frozenset({"get", "watch", "patch"})),
)
