"""A chat server that does what it is told, the bad things above all."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: What a server may send under status 200 that is no answer.
UNREADABLE = {
    "html": b"<html>busy</html>",
    "torn": b'{"choices": [{"message": {"content": "ye',
    "list": b"[]",
    "empty": b"",
    "deep": b"[" * 100_000,
    "not utf-8": b'{"choices": "\xff"}',
    "no choices": b'{"choices": []}',
    "null": b'{"choices": [{"message": {"content": null}}]}',
    "number": b'{"choices": [{"message": {"content": 3}}]}',
    "odd": b'{"choices": {"message": "yes"}}',
}
STALL_SECONDS = 60.0


class ChatServer:
    """Answers `answer(prompt, body)`, unless ``plan(prompt, attempt)`` says otherwise.

    A plan gives None for an answer, an HTTP status, a key of `UNREADABLE`, "stall", "drip" (a byte now and then) or
    "hang up".

    Attributes:
        requests: how often each prompt was asked.
        at_once, most_at_once: requests under way now, and at most.
    """

    def __init__(self) -> None:
        self.plan: Callable[[str, int], int | str | None] = lambda prompt, attempt: None
        self.answer: Callable[[str, dict[str, Any]], str] = lambda prompt, body: f"re: {prompt}"
        self.headers: dict[str, str] = {}
        self.requests: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.keys: set[str | None] = set()
        self.at_once = self.most_at_once = 0
        self.pause_seconds = 0.0
        self.closing = threading.Event()
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                self._send(200, b'{"data": [{"id": "m"}]}')

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["content-length"])))
                server._serve(self, body)

            def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
                self.send_response(status)
                self.send_header("content-type", "application/json")
                self.send_header("content-length", str(len(content)))
                for name, value in (headers or {}).items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(content)

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"

    def _serve(self, handler: Any, body: dict[str, Any]) -> None:
        content = body["messages"][-1]["content"]
        prompt = content if isinstance(content, str) else content[-1]["text"]
        with self._lock:
            attempt = self.requests[prompt]
            self.requests[prompt] += 1
            self.bodies.append(body)
            self.keys.add(handler.headers.get("authorization"))
            self.at_once += 1
            self.most_at_once = max(self.most_at_once, self.at_once)
            step = self.plan(prompt, attempt)
        try:
            time.sleep(self.pause_seconds)
            if step == "stall":
                self.closing.wait(STALL_SECONDS)
            elif step == "drip":
                handler.send_response(200)
                handler.end_headers()
                while not self.closing.wait(0.05):
                    handler.wfile.write(b" ")
            elif step == "hang up":
                handler.close_connection = True
            elif isinstance(step, int):
                message = f"no, {handler.headers.get('authorization')}"
                handler._send(step, json.dumps({"error": {"message": message}}).encode(), self.headers)
            elif step is not None:
                handler._send(200, UNREADABLE[step])
            else:
                message = {"role": "assistant", "content": self.answer(prompt, body)}
                usage = {"prompt_tokens": 100, "completion_tokens": 50}
                handler._send(200, json.dumps({"choices": [{"message": message}], "usage": usage}).encode())
        except OSError:
            pass
        finally:
            with self._lock:
                self.at_once -= 1


@contextmanager
def chat_server() -> Iterator[ChatServer]:
    """A running server."""
    server = ChatServer()
    thread = threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.closing.set()
        server.http.shutdown()
        server.http.server_close()
