"""The API of `KubernetesApi` over HTTP: addresses, credentials, answers, streams, and what goes wrong with them."""

from __future__ import annotations

import json
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

from tests.cluster.apiserver.running import Server
from tests.cluster.kubernetes_api import KubernetesApi, Object, Refusal

TOKEN = "token-of-the-test"
ADDRESS = re.compile(
    r"/(?:api/v1|apis/(?P<group>[^/]+)/(?P<version>[^/]+))/namespaces/(?P<namespace>[^/]+)"
    r"/(?P<plural>[^/]+)(?:/(?P<name>[^/]+)(?:/(?P<sub>[^/]+)(?P<rest>/.*)?)?)?"
)
KNOWN = {"trainjobs", "pods", "events", "deployments", "services"}


def _handler(api: KubernetesApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        lost = False

        def log_message(self, *arguments: Any) -> None:
            pass

        def answer(self) -> None:
            size = int(self.headers.get("content-length") or 0)
            body = self.rfile.read(size) if size else b""
            try:
                self.route(body)
            except Refusal as refusal:
                self.send(refusal.code, refusal.status())
            except OSError:
                self.close_connection = True

        do_GET = do_POST = do_PATCH = do_DELETE = answer

        def route(self, body: bytes) -> None:
            parts = urlsplit(self.path)
            query = {key: values[-1] for key, values in parse_qs(parts.query).items()}
            match = ADDRESS.fullmatch(parts.path)
            scheme, _, token = self.headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or token != TOKEN:
                raise Refusal(401, "Unauthorized", "Unauthorized")
            if match is None or match["plural"] not in KNOWN - api.absent:
                raise Refusal(404, "NotFound", "the server could not find the requested resource")
            plural, name, sub = match["plural"], match["name"], match["sub"]
            watch = query.get("watch") in ("true", "True")
            verb = {"POST": "create", "PATCH": "patch", "DELETE": "delete"}.get(self.command, "get" if name else "list")
            verb = "watch" if watch else verb
            resource = f"{plural}/{sub}" if sub else plural
            api.asked[match["group"] or "", resource, verb] += 1
            if (verb, resource) in api.forbidden:
                raise Refusal(
                    403, "Forbidden", f'{plural} is forbidden: User "test" cannot {verb} resource "{resource}"'
                )
            if not watch and sub is None and api.faults:
                fault = api.faults.popleft()
                if fault == "reset":
                    raise ConnectionResetError
                self.lost = fault == "lost"
                if not self.lost:
                    raise Refusal(int(fault), "ServiceUnavailable", "the server is not able to handle the request now")
            if sub == "log":
                self.send_log(name, query)
            elif sub == "proxy":
                self.forward(name, match["rest"] or "/", body)
            elif plural in api.elsewhere:
                self.pass_on(api.elsewhere[plural], body, watch)
            elif watch:
                lines = (json.dumps(event) for event in api.events(plural, query))
                self.stream(lines, torn=True)
            elif self.command == "GET" and name:
                self.send(200, api.read(plural, name))
            elif self.command == "GET":
                items, version = api.select(plural, query)
                self.send(200, {"kind": "List", "metadata": {"resourceVersion": version}, "items": items})
            elif self.command == "POST":
                strictly = query.get("fieldValidation") == "Strict"
                self.send(201, api.create(plural, json.loads(body), query.get("fieldManager", "python"), strictly))
            elif self.command == "PATCH":
                content_type = self.headers["content-type"]
                self.send(200, api.patch(plural, name, json.loads(body), content_type, query))
            else:
                api.delete(plural, name)
                self.send(200, {"kind": "Status", "apiVersion": "v1", "metadata": {}, "status": "Success"})

        def send_log(self, pod: str, query: dict[str, str]) -> None:
            key = (pod, query["container"], query.get("previous") == "true")
            if key not in api.logs:
                raise Refusal(400, "BadRequest", f'container "{key[1]}" in pod "{pod}" is waiting to start')
            log = api.logs[key]

            def lines() -> Iterator[str]:
                # The API compares whole seconds.
                since, at = query.get("sinceTime", "")[:19], 0
                if "tailLines" in query:
                    at = max(0, len(log.lines) - int(query["tailLines"]))
                while True:
                    while at < len(log.lines):
                        stamp, text = log.lines[at]
                        at += 1
                        if stamp[:19] >= since:
                            yield f"{stamp} {text}" if query.get("timestamps") == "true" else text
                    if log.closed or query.get("follow") != "true" or api.closing:
                        return
                    time.sleep(0.005)

            self.stream(lines(), torn=False)

        def stream(self, lines: Iterator[str], torn: bool) -> None:
            left = api.cuts.popleft() if api.cuts else None
            self.send_response(200)
            self.send_header("transfer-encoding", "chunked")
            self.end_headers()
            for line in lines:
                if left == 0:
                    if torn:
                        self.chunk(line[: len(line) // 2].encode())
                    raise ConnectionResetError
                left = None if left is None else left - 1
                self.chunk(f"{line}\n".encode())
            self.chunk(b"")

        def chunk(self, data: bytes) -> None:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            self.wfile.flush()

        def forward(self, service: str, path: str, body: bytes) -> None:
            target = api.services(service.removeprefix("http:").partition(":")[0])
            if target is None:
                raise Refusal(503, "ServiceUnavailable", f'no endpoints available for service "{service}"')
            request = urllib.request.Request(f"{target}{path}", body or None, {"content-type": "application/json"})
            try:
                with urllib.request.urlopen(request, timeout=120) as response:
                    status, content = response.status, response.read()
            except urllib.error.HTTPError as error:
                status, content = error.code, error.read()
            self.send(status, content)

        def pass_on(self, server: Server, body: bytes, watch: bool) -> None:
            headers = {name: self.headers[name] for name in ("accept", "content-type") if name in self.headers}
            headers["authorization"] = f"Bearer {server.token}"
            request = urllib.request.Request(f"{server.url}{self.path}", body or None, headers, method=self.command)
            try:
                response = urllib.request.urlopen(request, timeout=120, context=server.tls)
            except urllib.error.HTTPError as error:
                self.send(error.code, error.read())
                return
            with response:
                if watch:
                    self.stream((line.decode().rstrip("\n") for line in response), torn=True)
                else:
                    self.send(response.status, response.read())

        def send(self, status: int, content: Object | bytes) -> None:
            if self.lost:
                raise ConnectionResetError
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

    return Handler


@contextmanager
def serving(api: KubernetesApi, tls: ssl.SSLContext | None = None) -> Iterator[str]:
    """`api` at an address of this machine, with `tls` by HTTPS."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(api))
    if tls:
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{server.server_port}"
    finally:
        api.closing = True
        server.shutdown()
        server.server_close()
