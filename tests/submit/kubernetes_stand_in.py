"""The few answers of the Kubernetes API that `doctor` asks for, and a kubeconfig that leads to them."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import yaml


def node(name: str, gpus: int = 0, product: str = "", ready: bool = True, cordoned: bool = False) -> dict[str, Any]:
    return {
        "metadata": {"name": name, "labels": {"nvidia.com/gpu.product": product} if product else {}},
        "spec": {"unschedulable": True} if cordoned else {},
        "status": {
            "allocatable": {"cpu": "96", **({"nvidia.com/gpu": str(gpus)} if gpus else {})},
            "conditions": [{"type": "Ready", "status": "True" if ready else "False"}],
        },
    }


@contextmanager
def kubernetes(nodes: list[dict[str, Any]] | None, names: set[str], kubeconfig: Path) -> Iterator[None]:
    """Serve `nodes` (None: the user may not list them) and the objects whose paths end in `names`."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            path = self.path.split("?")[0]
            name = path.removeprefix("/api/v1/namespaces/shellv/")
            if path == "/api/v1/nodes":
                self.reply(*((200, {"kind": "NodeList", "items": nodes}) if nodes is not None else (403, {})))
            elif name in names:
                self.reply(200, {"metadata": {"name": name.split("/")[-1]}, "data": {}})
            else:
                self.reply(404, {"kind": "Status", "reason": "NotFound"})

        def reply(self, status: int, document: Any) -> None:
            data = json.dumps(document).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: Any) -> None:
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    cluster = {"server": f"http://127.0.0.1:{http.server_address[1]}"}
    document = {
        "apiVersion": "v1",
        "kind": "Config",
        "clusters": [{"name": "here", "cluster": cluster}],
        "users": [{"name": "me", "user": {}}],
        "contexts": [{"name": "here", "context": {"cluster": "here", "user": "me"}}],
        "current-context": "here",
    }
    kubeconfig.write_text(yaml.safe_dump(document))
    try:
        yield
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
