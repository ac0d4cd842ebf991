from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import pytest

from shellv_core.errors import ServingError
from shellv_core.serving.local_server import local_server

START_SECONDS = 250


@pytest.fixture
def server(model_path, tmp_path):
    with local_server(str(model_path), "127.0.0.1", 0, tmp_path / "logs" / "serve.log", START_SECONDS) as running:
        yield running


def gone(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def test_sigterm_lets_a_stream_finish_and_takes_no_more(server, tmp_path):
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 1000, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body, timeout=60) as response:
        lines = response.iter_lines()
        next(lines)
        os.kill(server.pid, signal.SIGTERM)
        while httpx.get(f"{server.url}/readyz").status_code == 200:
            pass
        assert httpx.get(f"{server.url}/healthz").status_code == 200
        refused = httpx.post(f"{server.url}/v1/chat/completions", json={**body, "stream": False})
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "shutting_down")
        assert int(refused.headers["retry-after"]) > 0
        rest = [line for line in lines if line]
    assert rest[-1] == "data: [DONE]"
    assert json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert os.waitstatus_to_exitcode(os.waitpid(server.pid, 0)[1]) == 0
    log = (tmp_path / "logs" / "serve.log").read_text()
    assert "stopping: 1 requests" in log
    assert "Traceback" not in log


def test_the_page_is_served_and_names_no_other_place(model_path):
    from shellv_core.serving.server import ServeConfig, background_server

    with background_server(ServeConfig(model=str(model_path), port=0, operations_port=None)) as url:
        page = httpx.get(f"{url}/ui/")
        model = httpx.get(f"{url}/v1/models").json()["data"][0]
    assert page.status_code == 200
    assert "fonts.googleapis" not in page.text
    assert model["id"] == model_path.name
    assert len(model["revision"]) == 64


def test_the_page_asks_for_a_key_where_there_are_keys(model_path, tmp_path):
    from shellv_core.serving.http.keys import new_key
    from shellv_core.serving.server import ServeConfig, background_server

    secret, key = new_key("ann", frozenset({"chat"}))
    (tmp_path / "keys").write_text(key.line())
    config = ServeConfig(model=str(model_path), port=0, operations_port=None, keys=tmp_path / "keys")
    with background_server(config) as url, httpx.Client(base_url=url) as client:
        assert client.get("/ui/config").status_code == 401
        assert client.post("/ui/login", data={"username": "ann", "password": "shellv-wrong"}).status_code == 400
        assert client.post("/ui/login", data={"username": "ann", "password": secret}).status_code == 200
        assert client.get("/ui/config").status_code == 200
        assert client.get("/v1/models").status_code == 401  # the page's cookie opens the page alone


def test_the_server_goes_with_a_killed_parent(model_path, tmp_path):
    script = (
        "import pathlib, sys, time\n"
        "from shellv_core.serving.local_server import local_server\n"
        f"with local_server({str(model_path)!r}, '127.0.0.1', 0, pathlib.Path('serve.log'), {START_SECONDS}) as one:\n"
        "    print(one.pid, flush=True)\n"
        "    time.sleep(100)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path.cwd())}
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, cwd=tmp_path, env=environment)
    pid = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while not gone(pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert gone(pid)


@pytest.mark.parametrize("taken", [False, True])
def test_a_server_that_cannot_start_says_why(tmp_path, model_path, taken):
    with socket.socket() as blocker:
        blocker.bind(("127.0.0.1", 0))
        blocker.listen()
        port = blocker.getsockname()[1] if taken else 0
        reference = str(model_path) if taken else "/nowhere/model"
        with (
            pytest.raises(ServingError, match="cannot listen on" if taken else "has no config.json"),
            local_server(reference, "127.0.0.1", port, tmp_path / "serve.log", START_SECONDS),
        ):
            pass
    assert "Traceback" not in (tmp_path / "serve.log").read_text()


def test_a_start_that_takes_too_long_is_ended(tmp_path, model_path):
    started = time.monotonic()
    with (
        pytest.raises(ServingError, match=r"(?s)not ready within 0.5 seconds.*startup_timeout_seconds"),
        local_server(str(model_path), "127.0.0.1", 0, tmp_path / "serve.log", 0.5),
    ):
        pass
    assert time.monotonic() - started < 15


def test_draining_fails_what_takes_too_long(model_path, monkeypatch):
    from shellv_core.serving.server import ServeConfig, background_server

    monkeypatch.setattr("shellv_core.serving.http.server.DRAIN_SECONDS", 0.3)
    lines = []
    config = ServeConfig(model=str(model_path), port=0, operations_port=None, ui=False)
    with background_server(config) as url:
        body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3000, "stream": True}
        begun = threading.Event()

        def read():
            with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=60) as response:
                for line in response.iter_lines():
                    lines.extend([line] if line else [])
                    begun.set()

        reader = threading.Thread(target=read)
        reader.start()
        begun.wait(30)
    reader.join()
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[-2].removeprefix("data: "))["error"]["code"] == "shutting_down"
