"""An object's states as they come, however often the connection is cut."""

from __future__ import annotations

import time
from collections.abc import Iterator
from typing import Any

from shellv_core.cluster.connection import TIMEOUT_SECONDS, Cluster, Resource
from shellv_core.logs import get_logger

logger = get_logger(__name__)

#: After a watch that ended at once, so that a broken server is not asked in a tight loop.
PAUSE_SECONDS = 0.5


def follow(cluster: Cluster, resource: Resource, name: str, interval_seconds: float) -> Iterator[dict[str, Any] | None]:
    """Yield an object at once, at each change, and at least every `interval_seconds`; None once there is none.

    A watch only makes it prompt: when one ends, is cut off, or its version of the world is too old (410), the object
    is read again and watched from there, so that no state is missed that lasts.

    Raises:
        ClusterError: if the API refuses, or does not answer for minutes.
    """
    while True:
        started = time.monotonic()
        found = cluster.get(resource, name)
        yield found
        if found is None:
            return
        version = found["metadata"]["resourceVersion"]
        for event in _watch(cluster, resource, name, version, interval_seconds):
            if event["type"] == "DELETED":
                yield None
                return
            if event["type"] in ("ADDED", "MODIFIED"):
                yield event["object"]
        time.sleep(max(0.0, min(PAUSE_SECONDS, interval_seconds) - (time.monotonic() - started)))


def _watch(
    cluster: Cluster, resource: Resource, name: str, version: str, interval_seconds: float
) -> Iterator[dict[str, Any]]:
    from kubernetes.client import ApiException, CustomObjectsApi
    from kubernetes.watch import Watch
    from urllib3.exceptions import HTTPError

    # Deployments too: to this call any group is a custom one.
    listed = CustomObjectsApi(cluster.api).list_namespaced_custom_object
    try:
        yield from Watch().stream(
            listed,
            resource.group,
            resource.version,
            cluster.namespace,
            resource.plural,
            field_selector=f"metadata.name={name}",
            resource_version=version,
            allow_watch_bookmarks=True,
            timeout_seconds=max(1, round(interval_seconds)),
            _request_timeout=(TIMEOUT_SECONDS[0], interval_seconds + TIMEOUT_SECONDS[1]),
        )
    except (ApiException, HTTPError, OSError, ValueError) as error:
        # ValueError: a line that was cut in the middle.
        logger.debug("the watch of %s was cut off: %s", name, error)
