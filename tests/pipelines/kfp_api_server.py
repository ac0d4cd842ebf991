"""An HTTP server that speaks the Kubeflow Pipelines API v2beta1 as far as kfp's own client asks for it.

The shapes are the real server's: JSON of its protobuf messages, the year 1970 for "not finished", the year 1 for a task
that goes on, workflow nodes with drivers and executors as task details, refusals as ``{"code", "message"}``. Names of
pipelines and of a pipeline's versions are unique, as there; those of runs are not. A test's script moves runs along.
"""

from __future__ import annotations

import copy
import email
import email.policy
import json
import re
import sys
import threading
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

API = "/apis/v2beta1"
NOT_FINISHED = "1970-01-01T00:00:00Z"
NOT_ENDED = "0001-01-01T00:00:00Z"
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
FINAL = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED")


class Refusal(Exception):
    """An answer other than 200: HTTP status and message."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass
class Fault:
    """What goes wrong with the next `count` requests that match.

    Attributes:
        method, path: which requests; `path` is searched for.
        status: the answer; 0 cuts the connection without one.
        after: whether the request is carried out before its answer is lost.
    """

    method: str
    path: str
    status: int
    count: int = 1
    after: bool = False


@dataclass
class Snapshot:
    """A state of a run: the run's own, its tasks' by name, and messages of failed tasks."""

    state: str
    tasks: dict[str, str] = field(default_factory=dict)
    errors: dict[str, str] = field(default_factory=dict)
    then: Callable[[], None] | None = None


def stamp(moment: datetime) -> str:
    return moment.strftime("%Y-%m-%dT%H:%M:%SZ")


class KfpServer:
    """The server's state and what a test sets; every request is kept in `requests` as (method, path)."""

    def __init__(self, token: str = "", cookie: str = "", multi_user: bool = False) -> None:
        self.token, self.cookie, self.multi_user = token, cookie, multi_user
        self.version = "2.17.0"
        self.pipelines: dict[str, dict[str, Any]] = {}
        self.versions: dict[str, dict[str, Any]] = {}
        self.experiments: dict[str, dict[str, Any]] = {}
        self.runs: dict[str, dict[str, Any]] = {}
        self.recurring: dict[str, dict[str, Any]] = {}
        self.faults: list[Fault] = []
        self.requests: list[tuple[str, str]] = []
        self.headers: list[dict[str, str]] = []
        #: What becomes of a new run: each look at it takes it one further, the last stays.
        self.script: list[Snapshot] = [Snapshot("PENDING"), Snapshot("RUNNING"), Snapshot("SUCCEEDED")]
        self.scripts: dict[str, list[Snapshot]] = {}
        self.url = ""
        self._clock = datetime.now(UTC).replace(microsecond=0)

    def fail(self, method: str, path: str, status: int, count: int = 1, after: bool = False) -> None:
        """Let the next `count` requests fail."""
        self.faults.append(Fault(method, path, status, count, after))

    def count(self, method: str, path: str) -> int:
        """How many requests matched."""
        return sum(each == method and re.search(path, where) is not None for each, where in self.requests)

    def now(self) -> str:
        self._clock += timedelta(seconds=1)
        return stamp(self._clock)

    # --- answers ---

    def answer(self, method: str, path: str, query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
        """The JSON document that answers a request."""
        if path == "/apis/v1beta1/healthz":
            return {"commit_sha": "0" * 40, "tag_name": self.version, "multi_user": self.multi_user}
        path = path.removeprefix(API)
        if path == "/healthz":
            return {"multi_user": self.multi_user, "pipeline_store": "database"}
        for pattern, routed in ROUTES.items():
            known_method, _, expression = pattern.partition(" ")
            if known_method == method and (match := re.fullmatch(expression, path)):
                if path.endswith("/upload_version"):
                    return self.upload_version(query, body, headers)
                document = json.loads(body) if body else {}
                return getattr(self, routed)(*match.groups(), query=query, document=document)
        raise Refusal(404, f"Not Found: {method} {path}")

    def list_pipelines(self, query: dict[str, str], document: Any) -> Any:
        return self._page("pipelines", self.pipelines.values(), query)

    def create_pipeline(self, query: dict[str, str], document: Any) -> Any:
        name = document.get("name") or document["display_name"]
        if any(each["name"] == name for each in self.pipelines.values()):
            raise Refusal(409, f"Failed to create a new pipeline: The name {name} already exist.")
        return self._add(self.pipelines, "pipeline_id", {**document, "name": name})

    def list_versions(self, pipeline_id: str, query: dict[str, str], document: Any) -> Any:
        found = [each for each in self.versions.values() if each["pipeline_id"] == pipeline_id]
        return self._page("pipeline_versions", found, query)

    def get_version(self, pipeline_id: str, version_id: str, query: dict[str, str], document: Any) -> Any:
        return self._get(self.versions, version_id, "pipeline version")

    def upload_version(self, query: dict[str, str], body: bytes, headers: dict[str, str]) -> Any:
        head = f"Content-Type: {headers['content-type']}\r\n\r\n".encode()
        parts = list(email.message_from_bytes(head + body, policy=email.policy.HTTP).iter_parts())
        files = [each for each in parts if each.get_param("name", header="content-disposition") == "uploadfile"]
        if not files or not files[0].get_filename():
            raise Refusal(400, "Failed to create a pipeline version due to error reading pipeline file")
        self._get(self.pipelines, query["pipelineid"], "pipeline")
        spec, *platform = list(yaml.load_all(files[0].get_payload(decode=True), Loader=LOADER))
        name = query["name"]
        if any((v["pipeline_id"], v["name"]) == (query["pipelineid"], name) for v in self.versions.values()):
            raise Refusal(409, f"Failed to create a pipeline version: The name {name} already exist.")
        whole = {"pipeline_spec": spec, "platform_spec": platform[0]} if platform else spec
        entry = {
            "pipeline_id": query["pipelineid"],
            "name": name,
            "display_name": query.get("display_name", name),
            "pipeline_spec": whole,
        }
        return self._add(self.versions, "pipeline_version_id", entry)

    def list_experiments(self, query: dict[str, str], document: Any) -> Any:
        self._check_namespace(query.get("namespace"))
        return self._page("experiments", self.experiments.values(), query)

    def create_experiment(self, query: dict[str, str], document: Any) -> Any:
        self._check_namespace(document.get("namespace"))
        if any(each["display_name"] == document["display_name"] for each in self.experiments.values()):
            raise Refusal(409, "Already exist error: experiment name already exists")
        return self._add(self.experiments, "experiment_id", {**document, "storage_state": "AVAILABLE"})

    def list_runs(self, query: dict[str, str], document: Any) -> Any:
        if "experiment_id" not in query:
            self._check_namespace(query.get("namespace"))
        runs = [each for each in self.runs.values() if query.get("experiment_id") in (None, each["experiment_id"])]
        return self._page("runs", list(map(self._run, runs)), query)

    def create_run(self, query: dict[str, str], document: Any) -> Any:
        self._check_content(document)
        entry = {**document, "state": "PENDING", "storage_state": "AVAILABLE", "finished_at": NOT_FINISHED}
        entry["state_history"] = [{"update_time": self.now(), "state": "PENDING"}]
        run = self._add(self.runs, "run_id", entry)
        self.scripts[run["run_id"]] = list(self.script)
        return self._run(run)

    def get_run(self, run_id: str, query: dict[str, str], document: Any) -> Any:
        run = self._get(self.runs, run_id, "run")
        script = self.scripts.get(run_id) or []
        if script and not (run["state"] == "CANCELING" and script[0].state not in FINAL):
            self._move(run, script.pop(0))
        return self._run(run)

    def terminate_run(self, run_id: str, query: dict[str, str], document: Any) -> Any:
        run = self._get(self.runs, run_id, "run")
        if run["state"] in FINAL:
            raise Refusal(400, f"Failed to terminate run {run_id}: the run is already finished")
        self._enter(run, "CANCELING")
        # A server's own: the workflow of a terminated run ends as failed.
        self.scripts[run_id] = [Snapshot("FAILED", dict.fromkeys(run.get("_tasks", {}), "FAILED"))]
        return {}

    def list_recurring(self, query: dict[str, str], document: Any) -> Any:
        return self._page("recurringRuns", self.recurring.values(), query)

    def create_recurring(self, query: dict[str, str], document: Any) -> Any:
        self._check_content(document)
        if len(document["trigger"]["cron_schedule"]["cron"].split()) != 6:
            raise Refusal(400, "Schedule cron is not a supported format")
        if not 1 <= int(document["max_concurrency"]) <= 10:
            raise Refusal(400, "The max concurrency must be between 1 and 10")
        return self._add(self.recurring, "recurring_run_id", {**document, "status": "ENABLED"})

    def delete_recurring(self, recurring_id: str, query: dict[str, str], document: Any) -> Any:
        self._get(self.recurring, recurring_id, "recurring run")
        del self.recurring[recurring_id]
        return {}

    # --- parts of answers ---

    def _check_namespace(self, namespace: str | None) -> None:
        if self.multi_user and namespace != "team":
            raise Refusal(403, f"User 'someone' is not authorized in namespace '{namespace or ''}'")

    def _check_content(self, document: dict[str, Any]) -> None:
        reference = document["pipeline_version_reference"]
        version = self._get(self.versions, reference["pipeline_version_id"], "pipeline version")
        if document["experiment_id"] not in self.experiments:
            raise Refusal(404, "experiment not found")
        spec = version["pipeline_spec"].get("pipeline_spec", version["pipeline_spec"])
        definitions = spec["root"]["inputDefinitions"]["parameters"]
        given = document.get("runtime_config", {}).get("parameters", {})
        for name, definition in definitions.items():
            if not definition.get("isOptional") and name not in given:
                raise Refusal(400, f"Failed to validate pipeline inputs: parameter {name} is required")
        if strange := set(given) - set(definitions):
            raise Refusal(400, f"parameter(s) {strange} not found in the pipeline")

    def _move(self, run: dict[str, Any], snapshot: Snapshot) -> None:
        if snapshot.then is not None:
            snapshot.then()
        run["_tasks"] = {**run.get("_tasks", {}), **snapshot.tasks}
        run["_errors"] = {**run.get("_errors", {}), **snapshot.errors}
        self._enter(run, snapshot.state)
        details = run.setdefault("run_details", {}).setdefault("task_details", [])
        self._node(run, details, "root-driver", "SUCCEEDED")
        for node in (f"{run['run_id'][:8]}-workflow", "root"):
            self._node(run, details, node, "RUNNING" if snapshot.state not in FINAL else snapshot.state)
        for name, state in snapshot.tasks.items():
            if name in snapshot.errors and snapshot.errors[name].startswith("driver"):
                self._node(run, details, f"{name}-driver", state, snapshot.errors[name])
                continue
            self._node(run, details, f"{name}-driver", "SUCCEEDED")
            self._node(run, details, name, state, snapshot.errors.get(name))

    def _node(self, run: dict[str, Any], details: list[Any], name: str, state: str, error: str | None = None) -> None:
        node = next((each for each in details if each["display_name"] == name), None)
        if node is None:
            begun = self.now()
            node = {
                "run_id": run["run_id"],
                "task_id": str(uuid.uuid4()),
                "display_name": name,
                "create_time": begun,
                "start_time": begun,
                "end_time": NOT_ENDED,
                "state_history": [],
                "child_tasks": [{"pod_name": f"workflow-{len(details)}"}],
            }
            details.append(node)
        if node.get("state") != state:
            node["state_history"].append({"update_time": self.now(), "state": state})
        node["state"] = state
        if state in FINAL and node["end_time"] == NOT_ENDED:
            node["end_time"] = self.now()
        if error:
            node["error"] = {"code": 13, "message": error}

    def _enter(self, run: dict[str, Any], state: str) -> None:
        if run["state"] != state:
            run["state_history"].append({"update_time": self.now(), "state": state})
        run["state"] = state
        if state in FINAL and run["finished_at"] == NOT_FINISHED:
            run["finished_at"] = self.now()

    @staticmethod
    def _run(run: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in copy.deepcopy(run).items() if not key.startswith("_")}

    def _add(self, entries: dict[str, dict[str, Any]], key: str, entry: dict[str, Any]) -> dict[str, Any]:
        entry = {**entry, key: str(uuid.uuid4()), "created_at": self.now()}
        entries[entry[key]] = entry
        return entry

    @staticmethod
    def _get(entries: dict[str, dict[str, Any]], key: str, kind: str) -> dict[str, Any]:
        if key not in entries:
            raise Refusal(404, f"Failed to get a {kind}: ResourceNotFoundError: {kind} {key} not found")
        return entries[key]

    @staticmethod
    def _page(field_name: str, entries: Any, query: dict[str, str]) -> Any:
        found = list(entries)
        for predicate in json.loads(query.get("filter") or "{}").get("predicates", []):
            if predicate["operation"] not in ("EQUALS", 1):  # an enumeration of protobuf, by name or number
                raise Refusal(400, "Invalid filter")
            found = [each for each in found if each[predicate["key"]] == predicate["stringValue"]]
        if query.get("sort_by") == "created_at desc":
            found.sort(key=lambda each: each["created_at"], reverse=True)
        start, size = int(query.get("page_token") or 0), int(query.get("page_size") or 10)
        page = {field_name: found[start : start + size], "total_size": len(found)}
        # protobuf leaves empty fields out
        return {
            **{key: value for key, value in page.items() if value},
            **({"next_page_token": str(start + size)} if start + size < len(found) else {}),
        }


ROUTES = {
    "GET /pipelines": "list_pipelines",
    "POST /pipelines": "create_pipeline",
    "POST /pipelines/upload_version": "upload_version",
    "GET /pipelines/([^/]+)/versions": "list_versions",
    "GET /pipelines/([^/]+)/versions/([^/]+)": "get_version",
    "GET /experiments": "list_experiments",
    "POST /experiments": "create_experiment",
    "GET /runs": "list_runs",
    "POST /runs": "create_run",
    "GET /runs/([^/:]+)": "get_run",
    "POST /runs/([^/:]+):terminate": "terminate_run",
    "GET /recurringruns": "list_recurring",
    "POST /recurringruns": "create_recurring",
    "DELETE /recurringruns/([^/:]+)": "delete_recurring",
}


class Handler(BaseHTTPRequestHandler):
    """One request: authentication, faults, answer."""

    protocol_version = "HTTP/1.1"
    kfp: KfpServer

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self.handle_request("GET")

    def do_POST(self) -> None:
        self.handle_request("POST")

    def do_DELETE(self) -> None:
        self.handle_request("DELETE")

    def handle_request(self, method: str) -> None:
        kfp, parts = self.kfp, urlsplit(self.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        kfp.requests.append((method, parts.path))
        kfp.headers.append({name.lower(): value for name, value in self.headers.items()})
        fault = next((each for each in kfp.faults if each.method == method and re.search(each.path, parts.path)), None)
        if fault is not None:
            fault.count -= 1
            if fault.count == 0:
                kfp.faults.remove(fault)
            if not fault.after:
                self.fail(fault)
                return
        if kfp.token and self.headers.get("Authorization") != f"Bearer {kfp.token}":
            self.send(401, {"code": 16, "message": "Request header error: there is no valid user identity"})
            return
        if kfp.cookie and kfp.cookie not in (self.headers.get("Cookie") or ""):
            self.send_response(302)
            self.send_header("Location", "/dex/auth?client_id=kubeflow")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        try:
            document = kfp.answer(method, parts.path, query, body, kfp.headers[-1])
        except Refusal as refusal:
            self.send(refusal.status, {"code": 3, "message": str(refusal), "details": []})
            return
        if fault is not None:
            self.fail(fault)
            return
        self.send(200, document)

    def fail(self, fault: Fault) -> None:
        if fault.status == 0:
            self.close_connection = True
            self.connection.close()
            return
        self.send(fault.status, {"code": 13, "message": "Internal Server Error: database is locked"})

    def send(self, status: int, document: Any) -> None:
        data = json.dumps(document).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


class HttpServer(ThreadingHTTPServer):
    """A server that takes it calmly when a client hangs up."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextmanager
def serving(kfp: KfpServer, handler: type[BaseHTTPRequestHandler] = Handler, port: int = 0) -> Iterator[KfpServer]:
    """Serve `kfp` on a free port of this machine; `kfp.url` is its address."""
    http = HttpServer(("127.0.0.1", port), type("BoundHandler", (handler,), {"kfp": kfp}))
    kfp.url = f"http://127.0.0.1:{http.server_address[1]}"
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield kfp
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
