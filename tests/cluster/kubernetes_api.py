"""The part of a Kubernetes API server that this project uses, faithful where it bites, for the official Python client.

Objects with versions and owners, label and field selectors, merge patches and server-side apply, deletion with
finalizers, watches with bookmarks that end, break and expire, logs that are followed, a Service's proxy. What a test
wants to go wrong goes into `faults`, `cuts` and `forbidden`; what was asked is in `asked`.
"""

from __future__ import annotations

import copy
import re
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator
from typing import Any

from tests.cluster.apiserver.running import Server
from tests.cluster.server_side_apply import Conflict, Path, apply, owned_fields
from tests.cluster.train_job_crd import IMMUTABLE, unknown_fields

NAME = re.compile(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?")
Key = tuple[str, str]
Object = dict[str, Any]


class Refusal(Exception):
    """An answer that is no success, with the API's word for it."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason

    def status(self) -> Object:
        """The body that the server sends."""
        return {
            "kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Failure",
            "message": str(self), "reason": self.reason, "code": self.code,
        }  # fmt: skip


class Log:
    """A container's log: lines with time stamps; whoever follows it gets more until it is closed."""

    def __init__(self) -> None:
        self.lines: list[tuple[str, str]] = []
        self.closed = False

    def add(self, *lines: str) -> None:
        """Write lines, each a millisecond after the one before."""
        for line in lines:
            milliseconds = f"{len(self.lines):03d}".rstrip("0")
            self.lines.append((f"2026-01-01T00:00:00{'.' + milliseconds if milliseconds else ''}Z", line))


class KubernetesApi:
    """The server's state, and what a test may do to it behind the client's back.

    Attributes:
        faults: for the next requests other than watches and logs: an HTTP status, "reset" for a connection that is cut
            at once, "lost" for one that is cut when all is done and only the answer is missing.
        cuts: for the next watches and followed logs: break off after so many lines (a watch's in the middle of one).
        forbidden: verb and resource that the account lacks.
        absent: kinds that nobody has installed.
        asked: how often each (group, resource, verb) was.
        reads: how often each (plural, name) was read.
        changed: called with every object that was written.
        elsewhere: kinds that another server keeps; requests for them are passed on to it as they are.
        services: the address behind a Service's name, None while it has no endpoint.
    """

    def __init__(self) -> None:
        self.objects: dict[Key, Object] = {}
        self.owners: dict[Key, dict[str, set[Path]]] = {}
        self.logs: dict[tuple[str, str, bool], Log] = {}
        self.faults: deque[int | str] = deque()
        self.cuts: deque[int] = deque()
        self.forbidden: set[tuple[str, str]] = set()
        self.absent: set[str] = set()
        self.asked: Counter[tuple[str, str, str]] = Counter()
        self.reads: Counter[Key] = Counter()
        self.changed: Callable[[Key], None] = lambda key: None
        self.elsewhere: dict[str, Server] = {}
        self.services: Callable[[str], str | None] = lambda name: None
        self.closing = False
        self.changes = threading.Condition(threading.RLock())
        self._version, self._oldest = 100, 0
        self._history: list[tuple[int, str, Key, Object]] = []

    def expire(self) -> None:
        """Forget the past, as etcd's compaction does: watches from before now end with 410."""
        with self.changes:
            self._version += 1
            self._oldest = self._version

    def stored(self, plural: str, name: str) -> Object | None:
        """An object, without a request."""
        return self.objects.get((plural, name))

    def names(self, plural: str) -> set[str]:
        """All objects of a kind, without a request."""
        return {name for kind, name in self.objects if kind == plural}

    def put(self, plural: str, item: Object, manager: str = "kubectl") -> None:
        """Create or replace an object, all its fields `manager`'s."""
        key = (plural, item["metadata"]["name"])
        self.owners[key] = {manager: {path for path, _ in owned_fields(item)}}
        self.write(key, item)

    def set_status(self, plural: str, name: str, **status: Any) -> None:
        """Merge into an object's status, as its controller does."""
        with self.changes:
            item = copy.deepcopy(self.objects[plural, name])
            item["status"] = {**item.get("status", {}), **status}
            self.write((plural, name), item)

    def remove(self, plural: str, name: str) -> None:
        """Let an object be gone, finalizers or not."""
        with self.changes:
            item = self.objects.pop((plural, name))
            self._record("DELETED", (plural, name), item)

    def log(self, pod: str, container: str, previous: bool = False) -> Log:
        """A container's log; made if there is none yet."""
        return self.logs.setdefault((pod, container, previous), Log())

    def write(self, key: Key, item: Object) -> Object:
        """Store an object if it differs from what is there; its versions are counted here."""
        with self.changes:
            before = self.objects.get(key)
            meta = item["metadata"]
            if before is not None and _content(before) == _content(item):
                return before
            meta.setdefault("uid", f"uid-{self._version}")
            meta.setdefault("creationTimestamp", f"2026-01-01T00:00:{len(self._history) % 60:02d}Z")
            if before is None or before.get("spec") != item.get("spec"):
                meta["generation"] = (before or {"metadata": {}})["metadata"].get("generation", 0) + 1
            self.objects[key] = item
            self._record("MODIFIED" if before else "ADDED", key, item)
        self.changed(key)
        return self.objects.get(key, item)

    def _record(self, kind: str, key: Key, item: Object) -> None:
        with self.changes:
            self._version += 1
            item["metadata"]["resourceVersion"] = str(self._version)
            self._history.append((self._version, kind, key, copy.deepcopy(item)))
            self.changes.notify_all()

    def create(self, plural: str, item: Object, manager: str, strictly: bool = False) -> Object:
        """POST; strictly is without unknown fields in a TrainJob."""
        name = item["metadata"].get("name", "")
        if strictly and plural == "trainjobs" and (unknown := list(unknown_fields(item))):
            listed = ", ".join(f'unknown field "{field}"' for field in unknown)
            what = 'TrainJob in version "v1alpha1" cannot be handled as a TrainJob'
            raise Refusal(400, "BadRequest", f"{what}: strict decoding error: {listed}")
        if not NAME.fullmatch(name) or len(name) > 63:
            raise Refusal(422, "Invalid", f"{plural} {name!r} is invalid: metadata.name: a lowercase RFC 1123 label")
        with self.changes:
            if (plural, name) in self.objects:
                raise Refusal(409, "AlreadyExists", f'{_full(plural)} "{name}" already exists')
            # Its own address has the status.
            item = {field: each for field, each in item.items() if field != "status"}
            self.owners[plural, name] = {manager: {path for path, _ in owned_fields(item)}}
            return self.write((plural, name), item)

    def read(self, plural: str, name: str) -> Object:
        """GET of one."""
        with self.changes:
            if (plural, name) not in self.objects:
                raise Refusal(404, "NotFound", f'{_full(plural)} "{name}" not found')
            self.reads[plural, name] += 1
            return copy.deepcopy(self.objects[plural, name])

    def select(self, plural: str, query: dict[str, str]) -> tuple[list[Object], str]:
        """GET of many, and the version of the list."""
        chosen = _selector(query)
        with self.changes:
            found = [item for (kind, _), item in self.objects.items() if kind == plural and chosen(item)]
            return copy.deepcopy(found), str(self._version)

    def patch(self, plural: str, name: str, body: Object, content_type: str, query: dict[str, str]) -> Object:
        """PATCH: a merge patch, or server-side apply."""
        with self.changes:
            live = self.objects.get((plural, name))
            if content_type != "application/apply-patch+yaml":
                if live is None:
                    raise Refusal(404, "NotFound", f'{_full(plural)} "{name}" not found')
                merged = _merge(copy.deepcopy(live), body)
                if plural == "trainjobs" and merged["spec"]["runtimeRef"] != live["spec"]["runtimeRef"]:
                    raise Refusal(
                        422, "Invalid", f'TrainJob "{name}" is invalid: spec.runtimeRef: {IMMUTABLE["message"]}'
                    )
                return self.write((plural, name), merged)
            manager = query.get("fieldManager")
            if not manager:
                raise Refusal(422, "Invalid", "fieldManager: Required value: is required for apply patch")
            if live is None:
                if plural == "deployments" and "selector" not in body["spec"]:
                    raise Refusal(422, "Invalid", f'Deployment.apps "{name}" is invalid: spec.selector: Required value')
                return self.create(plural, body, manager)
            try:
                merged = apply(live, self.owners[plural, name], manager, body, query.get("force") == "true")
            except Conflict as error:
                raise Refusal(409, "Conflict", str(error)) from None
            return self.write((plural, name), merged)

    def delete(self, plural: str, name: str) -> None:
        """DELETE: at once, or once the finalizers are gone."""
        with self.changes:
            item = self.read(plural, name)
            if item["metadata"].get("finalizers"):
                item["metadata"]["deletionTimestamp"] = "2026-01-01T00:01:00Z"
                self.write((plural, name), item)
            else:
                self.remove(plural, name)

    def events(self, plural: str, query: dict[str, str]) -> Iterator[Object]:
        """A watch's events from `resourceVersion` on, until `timeoutSeconds` are over."""
        chosen, seen = _selector(query), int(query["resourceVersion"])
        deadline = time.monotonic() + float(query.get("timeoutSeconds", 60))
        while time.monotonic() < deadline and not self.closing:
            with self.changes:
                if seen < self._oldest:
                    yield {"type": "ERROR", "object": Refusal(410, "Expired", "too old resource version").status()}
                    return
                news = [each for each in self._history if each[0] > seen]
                if not news:
                    self.changes.wait(min(0.05, max(0.0, deadline - time.monotonic())))
            for version, kind, (of, _), item in news:
                seen = version
                if of == plural and chosen(item):
                    yield {"type": kind, "object": item}
        if query.get("allowWatchBookmarks"):
            yield {"type": "BOOKMARK", "object": {"metadata": {"resourceVersion": str(seen)}}}


def _full(plural: str) -> str:
    groups = {"trainjobs": "trainer.kubeflow.org", "deployments": "apps"}
    return f"{plural}.{groups[plural]}" if plural in groups else plural


def _content(item: Object) -> Object:
    """An object without what the server itself counts."""
    meta = {key: each for key, each in item["metadata"].items() if key not in ("resourceVersion", "generation")}
    return {**item, "metadata": meta}


def _merge(target: Any, patch: Any) -> Any:
    """RFC 7386."""
    if not isinstance(patch, dict):
        return patch
    target = target if isinstance(target, dict) else {}
    for key, value in patch.items():
        if value is None:
            target.pop(key, None)
        else:
            target[key] = _merge(target.get(key), value)
    return target


def _selector(query: dict[str, str]) -> Callable[[Object], bool]:
    labels = [each.partition("=")[::2] for each in query.get("labelSelector", "").split(",") if each]
    fields = [each.partition("=")[::2] for each in query.get("fieldSelector", "").split(",") if each]
    known = {"metadata.name", "involvedObject.name", "type"}
    if unknown := {name for name, _ in fields} - known:
        raise Refusal(400, "BadRequest", f"field label not supported: {', '.join(unknown)}")

    def value(item: Any, path: str) -> Any:
        for key in path.split("."):
            item = item.get(key, {})
        return item

    return lambda item: (
        all(item["metadata"].get("labels", {}).get(name) == each for name, each in labels)
        and all(value(item, name) == each for name, each in fields)
    )
