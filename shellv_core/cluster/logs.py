"""A job's log, passed on while it runs, through restarts of its pod and cuts of the connection."""

from __future__ import annotations

import contextlib
import http.client
import sys
import threading
from collections import deque
from collections.abc import Iterator
from types import TracebackType
from typing import Any

from shellv_core.cluster.connection import PODS, ApiError, Cluster
from shellv_core.cluster.pods import open_log
from shellv_core.errors import ClusterError
from shellv_core.logs import get_logger

logger = get_logger(__name__)

PAUSE_SECONDS = 2.0
#: After the job's end: what is left of the log comes within this time, or not at all.
DRAIN_SECONDS = 30.0
KEPT_LINES = 200


class FollowedLog:
    """Writes the log of the newest pod with these labels to standard error, each line once, while it is open.

    Attributes:
        tail: the last lines.
    """

    def __init__(self, cluster: Cluster, labels: str, container: str) -> None:
        self._cluster, self._labels, self._container = cluster, labels, container
        self.tail: deque[str] = deque(maxlen=KEPT_LINES)
        self._finishing, self._abandoned = threading.Event(), threading.Event()
        self._read: set[str] = set()
        self._thread = threading.Thread(target=self._run, name="log", daemon=True)

    def __enter__(self) -> FollowedLog:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._finishing.set()
        if kind is None:
            self._thread.join(DRAIN_SECONDS)
        self._abandoned.set()

    def _run(self) -> None:
        from urllib3.exceptions import HTTPError

        position, pod = _Position(), ""
        while not self._abandoned.is_set():
            last = self._finishing.is_set()
            try:
                newest = self._newest()
                if newest is not None:
                    name = newest["metadata"]["name"]
                    if name != pod:
                        pod, position = name, _Position()
                    for line in self._lines(pod, position):
                        self.tail.append(line)
                        sys.stderr.write(f"{line}\n")
                    if newest["status"]["phase"] != "Running":
                        self._read.add(pod)
                if last:
                    return
            except (ClusterError, HTTPError, OSError) as error:
                if isinstance(error, ApiError) and error.status == http.client.FORBIDDEN:
                    logger.warning("the job runs, its log cannot be shown: %s", error)
                    return
                logger.debug("the log of %s was cut off: %s", pod or self._labels, error)
                self._abandoned.wait(PAUSE_SECONDS if last else 0)
            self._finishing.wait(PAUSE_SECONDS)

    def _newest(self) -> dict[str, Any] | None:
        """The newest pod that has a log which was not read to its end."""
        pods = [
            each
            for each in self._cluster.list(PODS, labels=self._labels)
            if each.get("status", {}).get("phase") in ("Running", "Succeeded", "Failed")
            and each["metadata"]["name"] not in self._read
        ]
        return max(pods, key=lambda each: str(each["metadata"].get("creationTimestamp")), default=None)

    def _lines(self, pod: str, position: _Position) -> Iterator[str]:
        from kubernetes.watch.watch import iter_resp_lines

        query = {"container": self._container, "follow": "true", "timestamps": "true", "sinceTime": position.since}
        with contextlib.closing(open_log(self._cluster, pod, query)) as response:
            position.reopen()
            for line in iter_resp_lines(response):
                stamp, _, text = line.partition(" ")
                if position.advance(stamp):
                    yield text


class _Position:
    """How far a log was read: the time stamp of the last line, and how many lines had that very one."""

    def __init__(self) -> None:
        self.since = ""
        self._count = self._again = 0

    def reopen(self) -> None:
        """The log comes from `since` on once more."""
        self._again = 0

    def advance(self, stamp: str) -> bool:
        """Whether the next line, of this time stamp, is a new one."""
        # The fraction has no trailing zeros, so that stamps compare as text without the Z that ends them.
        key, last = stamp.removesuffix("Z"), self.since.removesuffix("Z")
        if last and key < last:
            return False
        if key == last:
            self._again += 1
            if self._again <= self._count:
                return False
            self._count += 1
            return True
        self.since, self._count, self._again = stamp, 1, 1
        return True
