"""Keys: who gets in, how often, and what a file of keys may look like."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from types import SimpleNamespace

import httpx
import pytest

from shellv_core.cli import main
from shellv_core.errors import ServingError
from shellv_core.serving.http.access import TokenBucket
from shellv_core.serving.http.keys import Keys, new_key, read_keys
from tests.serving.gated_engine import GatedEngine, wait_for

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 2}


@pytest.fixture(scope="module")
def key_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("keys") / "keys"
    secrets = {}
    lines = ["# who may ask\n", "\n"]
    for name, scopes in (("alice", {"chat"}), ("root", {"admin"}), ("both", {"chat", "admin"}), ("quick", {"chat"})):
        secrets[name], key = new_key(name, frozenset(scopes))
        lines.append(key.line() + "\n")
    path.write_text("".join(lines))
    return path, secrets


@pytest.fixture(scope="module")
def guarded(start_endpoint, key_file):
    from shellv_core.serving.http.config import ApiConfig, KeyLimits

    config = ApiConfig(keys=KeyLimits(requests_per_minute=1, burst=60, max_running=1))
    with start_endpoint(config, keys=Keys(key_file[0]), wrap=GatedEngine) as endpoint:
        yield endpoint


def headers(secret):
    return {"authorization": f"Bearer {secret}"}


@pytest.mark.parametrize(
    ("method", "path", "admin", "expected"),
    [
        ("GET", "/v1/models", False, {"alice": 200, "root": 403, "both": 200, "": 401, "wrong": 401}),
        ("GET", "/v1/models/tiny", False, {"alice": 200, "root": 403, "": 401}),
        ("POST", "/v1/chat/completions", False, {"alice": 400, "root": 403, "": 401}),
        ("POST", "/v1/completions", False, {"alice": 400, "root": 403, "": 401}),
        ("POST", "/tokenize", False, {"alice": 400, "root": 403, "": 401}),
        ("GET", "/v1/nothing", False, {"alice": 404, "": 401}),
        ("GET", "/healthz", False, {"": 200, "wrong": 200}),
        ("GET", "/readyz", False, {"": 200}),
        ("GET", "/startupz", False, {"": 200}),
        ("GET", "/openapi.json", False, {"": 200}),
        ("GET", "/metrics", False, {"both": 404}),
        ("POST", "/admin/drain", False, {"both": 404}),
        ("GET", "/metrics", True, {"": 200}),
        ("GET", "/internal/load", True, {"": 200}),
        ("POST", "/admin/keys/reload", True, {"root": 200, "both": 200, "alice": 403, "": 401, "wrong": 401}),
        ("POST", "/admin/drain", True, {"alice": 403, "": 401}),
        ("GET", "/v1/models", True, {"both": 404}),
    ],
)
def test_who_may_do_what(guarded, key_file, method, path, admin, expected):
    url = (guarded.operations_url if admin else guarded.url) + path
    for name, status in expected.items():
        secret = {"": None, "wrong": "shellv-wrong"}.get(name, key_file[1].get(name))
        response = httpx.request(
            method, url, headers=headers(secret) if secret else {}, json={} if method == "POST" else None
        )
        assert response.status_code == status, (name, response.text)
        if status in (401, 403):
            assert response.json()["error"]["type"] in ("authentication_error", "permission_error")
        assert ("www-authenticate" in response.headers) == (status == 401)


@pytest.mark.parametrize("value", ["", "Bearer", "Basic YTpi", "bearer\tx", "Bearer \xff\xfe"])
def test_other_ways_to_send_a_key(guarded, value):
    response = httpx.get(f"{guarded.url}/v1/models", headers={"authorization": value.encode("latin-1")})
    assert response.status_code == 401


def test_one_key_answers_one_request_at_a_time_here(guarded, key_file):
    mine = headers(key_file[1]["both"])
    body = {**CHAT, "stream": True}
    with (
        guarded.engine.shut(),
        httpx.stream("POST", f"{guarded.url}/v1/chat/completions", json=body, headers=mine, timeout=60) as response,
    ):
        assert response.status_code == 200
        second = httpx.get(f"{guarded.url}/v1/models", headers=mine)
        assert (second.status_code, second.json()["error"]["code"]) == (429, "rate_limit_exceeded")
        assert second.headers["retry-after"] == "1"
        assert httpx.get(f"{guarded.url}/v1/models", headers=headers(key_file[1]["alice"])).status_code == 200
    wait_for(lambda: httpx.get(f"{guarded.url}/v1/models", headers=mine).status_code == 200)


def test_the_pace_of_a_key(guarded, key_file):
    mine = headers(key_file[1]["quick"])
    with httpx.Client(base_url=guarded.url, headers=mine) as client:
        statuses = [client.get("/v1/models").status_code for _ in range(61)]
        assert statuses[:60] == [200] * 60
        refused = client.get("/v1/models")
    assert (statuses[60], refused.status_code) == (429, 429)
    assert 1 <= int(refused.headers["retry-after"]) <= 60


def test_a_bucket_fills_up_again(monkeypatch):
    now = [100.0]
    # Not the clock of all: servers of other tests live in this process, and their event loops would sleep for hours.
    monkeypatch.setattr("shellv_core.serving.http.access.time", SimpleNamespace(monotonic=lambda: now[0]))
    bucket = TokenBucket(per_minute=60, burst=2)
    assert [bucket.take(), bucket.take()] == [0, 0]
    assert bucket.take() == pytest.approx(1)
    now[0] += 1
    assert bucket.take() == 0
    now[0] += 1000
    assert [bucket.take() for _ in range(3)] == [0, 0, pytest.approx(1)]


def test_keys_are_read_again(guarded, key_file):
    path, secrets = key_file
    before = path.read_text()
    secret, key = new_key("late", frozenset({"chat"}))
    reload = lambda: httpx.post(f"{guarded.operations_url}/admin/keys/reload", headers=headers(secrets["root"]))  # noqa: E731
    ask = lambda: httpx.get(f"{guarded.url}/v1/models", headers=headers(secret)).status_code  # noqa: E731
    try:
        path.write_text(before + key.line() + "\n")
        assert ask() == 401
        assert reload().status_code == 200
        assert ask() == 200
        path.write_text("nonsense\n")
        reload()
        assert ask() == 200  # a broken file locks nobody out
    finally:
        path.write_text(before)
        reload()
    assert ask() == 401


def test_the_command_makes_keys(tmp_path, capsys):
    path = tmp_path / "keys"
    assert main(["key", "new", "--keys", str(path), "--name", "ann"]) == 0
    secret = capsys.readouterr().out.strip()
    assert main(["key", "new", "--keys", str(path), "--name", "bob", "--scope", "chat", "--scope", "admin"]) == 0
    assert re.fullmatch(r"shellv-[A-Za-z0-9_-]{43}", secret)
    assert secret not in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o600
    keys = Keys(path)
    assert (keys.find(secret).name, keys.find(secret).scopes) == ("ann", {"chat"})
    assert keys.find(secret + "x") is None
    assert [sorted(key.scopes) for key in read_keys(path)] == [["chat"], ["admin", "chat"]]
    assert main(["key", "new", "--keys", str(path), "--name", "ann"]) == 1
    assert "holds a key of ann already" in capsys.readouterr().err
    assert main(["key", "new", "--keys", str(path), "--name", "a b"]) == 1
    assert main(["key", "new", "--keys", str(tmp_path / "no" / "keys"), "--name", "a"]) == 1


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("shellv-secret\n", r":1 is not of the form NAME:SCOPE"),
        (f"a:chat:{'0' * 63}\n", "not of the form"),
        (f"a:chat,root:{'0' * 64}\n", "names the scope root; allowed: chat, admin"),
        (f"a:chat:{'0' * 64}\na:chat:{'1' * 64}\n", ":2 names a a second time"),
        (None, "cannot read the keys"),
        ("\xff", None),
    ],
)
def test_a_faulty_file(tmp_path, content, message):
    path = tmp_path / "keys"
    if content is not None:
        path.write_bytes(content.encode("latin-1"))
    with pytest.raises(ServingError, match=message) as caught:
        Keys(path)
    assert "shellv-secret" not in str(caught.value)


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.org"])
def test_no_open_door_by_accident(host):
    from shellv_core.serving.server import ServeConfig, serve

    with pytest.raises(ServingError, match="give --keys FILE"):
        serve(ServeConfig(model="/nowhere", host=host, port=0, operations_port=0))


def test_making_a_key_is_quick():
    code = "import sys; import shellv_core.serving.key_command, shellv_core.serving.http.keys; print(*sys.modules)"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ)
    assert not {"torch", "fastapi", "uvicorn", "pydantic"} & set(output.stdout.split())
