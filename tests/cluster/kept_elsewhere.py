"""The stand-in with the TrainJobs of a real API server: pods, logs and what goes wrong on the way are its own."""

from __future__ import annotations

import contextlib
import urllib.error
from typing import Any

from shellv_core.cluster.train_job import TRAIN_JOBS
from tests.cluster.apiserver.running import MERGE, Server
from tests.cluster.kubernetes_api import KubernetesApi, Object

NAMESPACE = "shellv"


class TrainJobsElsewhere(KubernetesApi):
    """What tests do to TrainJobs behind the client's back, done to those of `server` over its API."""

    def __init__(self, server: Server) -> None:
        super().__init__()
        self.server = server
        self.elsewhere = {TRAIN_JOBS.plural: server}

    def stored(self, plural: str, name: str) -> Object | None:
        if plural not in self.elsewhere:
            return super().stored(plural, name)
        with contextlib.suppress(urllib.error.HTTPError):
            found: Object = self.server.call("GET", TRAIN_JOBS.path(NAMESPACE, name))
            return found
        return None

    def names(self, plural: str) -> set[str]:
        if plural not in self.elsewhere:
            return super().names(plural)
        return {each["metadata"]["name"] for each in self.server.call("GET", TRAIN_JOBS.path(NAMESPACE))["items"]}

    def put(self, plural: str, item: Object, manager: str = "kubectl") -> None:
        if plural not in self.elsewhere:
            super().put(plural, item, manager)
        else:
            self.server.call("POST", f"{TRAIN_JOBS.path(NAMESPACE)}?fieldValidation=Strict", item)

    def set_status(self, plural: str, name: str, **status: Any) -> None:
        if plural not in self.elsewhere:
            super().set_status(plural, name, **status)
        else:
            path = f"{TRAIN_JOBS.path(NAMESPACE, name)}/status?fieldValidation=Strict"
            self.server.call("PATCH", path, {"status": status}, MERGE)

    def delete(self, plural: str, name: str) -> None:
        if plural not in self.elsewhere:
            super().delete(plural, name)
        else:
            self.server.call("DELETE", TRAIN_JOBS.path(NAMESPACE, name))

    def remove(self, plural: str, name: str) -> None:
        if plural not in self.elsewhere:
            super().remove(plural, name)
            return
        self.server.call("PATCH", TRAIN_JOBS.path(NAMESPACE, name), {"metadata": {"finalizers": None}}, MERGE)
        # The last finalizer of what is being deleted is its end.
        with contextlib.suppress(urllib.error.HTTPError):
            self.delete(plural, name)

    def expire(self) -> None:
        super().expire()
        self.server.forget()
