"""A small HTTP proxy before an S3 server that resets, refuses, cuts and delays answers, by a seeded draw.

Requests pass through untouched, the Host header included, since S3 signatures cover it.
"""

from __future__ import annotations

import random
import socket
import threading
import time
from collections import Counter
from dataclasses import dataclass, field
from types import TracebackType
from typing import BinaryIO
from urllib.parse import urlsplit

CHUNK = 1 << 16
REFUSAL = (
    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/xml\r\nContent-Length: 93\r\n\r\n"
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code><Message>reduce your rate</Message></Error>\n\n"
)


@dataclass
class Faults:
    """Shares of the GET requests that meet each fault; `stalls` is a number of requests in all."""

    reset: float = 0.0
    refused: float = 0.0
    cut: float = 0.0
    stalls: int = 0
    stall_seconds: float = 2.0
    seed: int = 0


@dataclass
class FaultyProxy:
    """Listens on a port of its own while it is entered; `url` takes the place of the server's address.

    Attributes:
        counts: GET requests, and how many of them met each fault.
    """

    target: str
    faults: Faults
    counts: Counter[str] = field(default_factory=Counter)

    def __enter__(self) -> FaultyProxy:
        parts = urlsplit(self.target)
        self._address = (str(parts.hostname), int(parts.port or 80))
        self._random = random.Random(self.faults.seed)
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._listener.close()

    def _accept(self) -> None:
        while True:
            try:
                client, _ = self._listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        try:
            with client, socket.create_connection(self._address) as server:
                # Headers go out in a write of their own; without this they wait for the body's acknowledgement.
                for each in (client, server):
                    each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                with client.makefile("rb") as requests, server.makefile("rb") as answers:
                    while self._exchange(client, server, requests, answers):
                        pass
        except OSError:
            pass  # one side went away, as this proxy itself does to the other

    def _exchange(self, client: socket.socket, server: socket.socket, requests: BinaryIO, answers: BinaryIO) -> bool:
        """Pass one request and its answer on; False once the connection is of no more use."""
        head = _read_head(requests)
        if not head:
            return False
        fault = self._draw() if head.startswith(b"GET ") else ""
        if fault == "reset":
            # Closing with a linger of zero sends a reset.
            client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            return False
        if fault == "refused":
            client.sendall(REFUSAL)
            return True
        server.sendall(head)
        _copy(requests, server, _body_bytes(head))
        answer = _read_head(answers)
        while answer.split(b" ", 2)[1:2] == [b"100"]:
            client.sendall(answer)
            answer = _read_head(answers)
        client.sendall(answer)
        length = 0 if head.startswith(b"HEAD ") else _body_bytes(answer)
        if fault == "cut":
            _copy(answers, client, length // 2)
            return False
        if fault == "stall":
            _copy(answers, client, length // 2)
            time.sleep(self.faults.stall_seconds)
            length -= length // 2
        _copy(answers, client, length)
        return True

    def _draw(self) -> str:
        faults = self.faults
        with self._lock:
            self.counts["requests"] += 1
            value = self._random.random()
            fault = ""
            for name, share in (("reset", faults.reset), ("refused", faults.refused), ("cut", faults.cut)):
                if value < share:
                    fault = name
                    break
                value -= share
            if not fault and self.counts["stall"] < faults.stalls and self._random.random() < 0.2:
                fault = "stall"
            if fault:
                self.counts[fault] += 1
            return fault


def _read_head(stream: BinaryIO) -> bytes:
    lines = []
    while line := stream.readline():
        lines.append(line)
        if line == b"\r\n":
            return b"".join(lines)
    return b""


def _body_bytes(head: bytes) -> int:
    for line in head.split(b"\r\n"):
        name, _, value = line.partition(b":")
        if name.lower() == b"content-length":
            return int(value)
    return 0


def _copy(source: BinaryIO, sink: socket.socket, length: int) -> None:
    while length:
        data = source.read(min(CHUNK, length))
        if not data:
            raise ConnectionError("the sender left before its message was complete")
        sink.sendall(data)
        length -= len(data)
