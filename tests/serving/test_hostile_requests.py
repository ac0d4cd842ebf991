"""Thousands of hostile requests against the program itself: it answers each, breaks at none and keeps no memory."""

from __future__ import annotations

import contextlib
import http.client
import random
import re
import socket
import threading
import time
from collections import Counter
from urllib.parse import urlsplit

import psutil
import pytest

from shellv_core.serving.local_server import local_server
from tests.serving.hostile_requests import Hostile, hostile_request

THREADS = 6
ANSWERED = {200, 400, 404, 405, 413, 422, 429}
MEMORY_SLACK = 32 << 20


class Attacker:
    """One connection at a time, which sends `count` requests from `seed`."""

    def __init__(self, url: str, seed: int, count: int) -> None:
        parts = urlsplit(url)
        self.address = (parts.hostname, parts.port)
        self.rng, self.count = random.Random(seed), count
        self.statuses: Counter[int] = Counter()
        self.faults: list[str] = []
        self._connection: http.client.HTTPConnection | None = None

    def run(self) -> None:
        for _ in range(self.count):
            request = None
            try:
                request = hostile_request(self.rng)
                status = self._send_raw(request.raw) if request.raw is not None else self._send(request)
            except Exception as error:  # noqa: BLE001  whatever it is, the test tells it
                self.faults.append(f"{error!r} at {str(request)[:300]}")
                return
            self.statuses[status] += 1
            if status and status not in ANSWERED:
                self.faults.append(f"{status} at {str(request)[:300]}")

    def _send(self, request: Hostile) -> int:
        for attempt in range(3):
            if self._connection is None:
                self._connection = http.client.HTTPConnection(*self.address, timeout=120)
            connection = self._connection
            try:
                connection.putrequest(request.method, request.path, skip_accept_encoding=True)
                for name, value in request.headers.items():
                    connection.putheader(name, value.encode("latin-1"))
                if "expect" not in request.headers:
                    connection.putheader("content-length", str(len(request.body)))
                connection.endheaders(request.body if "expect" not in request.headers else None)
                response = connection.getresponse()
                content = response.read()
            except (http.client.HTTPException, OSError):
                # A connection that was kept may be closed before it is used again; a fresh one must be answered.
                self._close()
                if attempt == 2:
                    raise
                continue
            if response.status == 200 and b'"type":"server_error"' in content:
                return 599
            if response.getheader("connection") == "close":
                self._close()
            return response.status
        return 0

    def _close(self) -> None:
        if self._connection is not None:
            self._connection.close()
            self._connection = None

    def _send_raw(self, data: bytes) -> int:
        """The first status that comes back before the server closes, 0 for none."""
        with socket.create_connection(self.address, timeout=120) as connection:
            answer = b""
            with contextlib.suppress(ConnectionError):
                connection.sendall(data)
            with contextlib.suppress(OSError):  # the server has closed it already
                connection.shutdown(socket.SHUT_WR)
            with contextlib.suppress(ConnectionError):
                while piece := connection.recv(65536):
                    answer += piece
        found = [int(each) for each in re.findall(rb"HTTP/1\.1 (\d{3}) ", answer)]
        return max(found, default=0)


def memory(pid: int) -> int:
    return int(psutil.Process(pid).memory_info().rss)


def attack(url: str, seed: int, count: int) -> tuple[Counter[int], list[str]]:
    attackers = [Attacker(url, seed * 1000 + index, count // THREADS) for index in range(THREADS)]
    threads = [threading.Thread(target=attacker.run) for attacker in attackers]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum((each.statuses for each in attackers), Counter()), [fault for each in attackers for fault in each.faults]


@pytest.mark.parametrize(
    "count", [pytest.param(600), pytest.param(100_000, marks=[pytest.mark.fuzz, pytest.mark.timeout(3 * 3600)])]
)
def test_hostile_requests(model_path, tmp_path, count):
    log = tmp_path / "serve.log"
    with local_server(str(model_path), "127.0.0.1", 0, log, 250) as server:
        # Long enough that the rarest and largest have come: what they make every pool and cache grow to is the base.
        warm = max(count // 5, 300)
        statuses, faults = attack(server.url, 0, warm)
        base, started, sent = memory(server.pid), time.monotonic(), sum(statuses.values())
        for part in range(1, 21):
            if sent >= count or faults:
                break
            found, faults = attack(server.url, part, max(count // 20, THREADS))
            statuses += found
            sent += sum(found.values())
            seconds, now = time.monotonic() - started, memory(server.pid)
            print(f"{sent} in {seconds:.0f} s, {now >> 20} MiB, {dict(sorted(statuses.items()))}", flush=True)
        assert faults == []
        children = psutil.Process(server.pid).children(recursive=True)
        connection = http.client.HTTPConnection(*urlsplit(server.url).netloc.split(":"), timeout=60)
        connection.request("GET", "/readyz")
        assert connection.getresponse().status == 200
        deadline = time.monotonic() + 60
        while memory(server.pid) > base + MEMORY_SLACK and time.monotonic() < deadline:
            time.sleep(0.5)
        final = memory(server.pid)
        print(f"memory: {base >> 20} MiB after {warm} requests, {final >> 20} MiB after {sent}")
    assert statuses[200] > 0
    assert statuses[400] > statuses[200]
    assert final <= base + MEMORY_SLACK
    assert len(children) <= 2
    assert "Traceback" not in log.read_text()
