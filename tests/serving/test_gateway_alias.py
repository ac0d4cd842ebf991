"""What an alias names is taken up while the server answers."""

from __future__ import annotations

import json
import threading
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest

from shellv_core.serving.gateway.config import ModelsFile
from shellv_core.serving.reference import find_registered, registered_revision
from shellv_core.storage import Manifest, OutputDirectory
from tests.serving.conftest import running_gateway
from tests.serving.gated_engine import wait_for
from tests.serving.tiny_model import build_model

NUM_CLIENTS = 8
REFERENCE = "models:/tiny@champion"


@pytest.fixture
def registry(tmp_path, tracking_store, processor):
    """A function that promotes a version with weights of its own in a registry on SQLite, and gives its revision."""
    from shellv_core.tracking.registry import ModelRegistry

    registry = ModelRegistry("tiny")

    def promote(number):
        folder = tmp_path / f"model-{number}"
        model = build_model(processor, context_length=4096)
        model.lm_head.weight.data.roll(number, 0)
        model.model.multi_modal_projector.linear_1.bias.data += number
        model.save_pretrained(folder)
        processor.save_pretrained(folder)
        output = OutputDirectory((tmp_path / f"merged-{number}").as_uri(), str(number))
        output.begin()
        output.put_tree(folder, "model")
        output.commit(Manifest(stage="merge_lora", fingerprint=str(number), library_version="0", config={}))
        version = registry.register(output.uri, str(number), str(number), {})
        registry.set_alias("champion", version.version)
        return registered_revision(find_registered(REFERENCE))

    return promote


def content(**entry):
    values = {"id": "tiny", "model": REFERENCE, **entry}
    return ModelsFile.model_validate({"models": [values], "poll_seconds": 0.2})


def ask(url, **body):
    """One streamed request: revision, and whether it came to its end."""
    body = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 40, "stream": True, **body}
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=body, timeout=120) as response:
        assert response.status_code == 200, response.read()
        events = [line.removeprefix("data: ") for line in response.iter_lines() if line.startswith("data")]
    assert events[-1] == "[DONE]"
    assert json.loads(events[-2])["choices"][0]["finish_reason"] == "length", events[-2]
    return response.headers["x-model-revision"]


def test_a_server_before_the_champion_and_a_promotion_under_load(registry):
    with running_gateway(content()) as endpoint:
        waiting = httpx.get(f"{endpoint.url}/readyz")
        assert waiting.status_code == 503
        assert "names no registered version" in waiting.text
        refused = httpx.post(
            f"{endpoint.url}/v1/chat/completions", json={"messages": [{"role": "user", "content": "a"}]}
        )
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "not_ready")
        assert refused.headers["retry-after"]
        assert httpx.get(f"{endpoint.url}/v1/models").json()["data"] == []

        first = registry(1)
        wait_for(lambda: httpx.get(f"{endpoint.url}/readyz").status_code == 200, 120)
        assert ask(endpoint.url) == first
        old = endpoint.engine.find().engine._engine

        enough = threading.Event()

        def stream():
            seen = []
            while not enough.is_set():
                seen.append(ask(endpoint.url))
            return [*seen, ask(endpoint.url)]

        with ThreadPoolExecutor(NUM_CLIENTS) as pool:
            clients = [pool.submit(stream) for _ in range(NUM_CLIENTS)]
            second = registry(2)
            try:
                wait_for(lambda: ask(endpoint.url) == second, 120)
            finally:
                enough.set()
            seen = [client.result() for client in clients]
        assert first != second
        assert {revision for each in seen for revision in each} == {first, second}
        for each in seen:
            assert each[-1] == second
            assert each == sorted(each, key=[first, second].index), "a client went back to the old revision"
        assert httpx.get(f"{endpoint.url}/v1/models").json()["data"][0]["revision"] == second
        wait_for(lambda: not old._thread.is_alive(), 60)


def test_a_pinned_alias_and_a_champion_that_does_not_fit(registry, monkeypatch):
    first = registry(1)
    with running_gateway(content()) as endpoint, running_gateway(content(follow=False)) as pinned:
        models = endpoint.engine
        with monkeypatch.context() as small:
            small.setattr("shellv_core.serving.inference.memory._free_ram", lambda: 1000)
            second = registry(2)
            wait_for(lambda: "Set swap: stop_first" in models.health().reason, 60)
        assert models.health().ready
        assert ask(endpoint.url) == first

        line = models._lines["tiny"]
        line.change(line.entry.model_copy(update={"swap": "stop_first"}))
        wait_for(lambda: models.list() and models.find().revision == second, 60)
        assert ask(endpoint.url) == second
        assert ask(pinned.url) == first


def test_a_champion_that_does_not_load_changes_nothing(registry, tmp_path):
    first = registry(1)
    with running_gateway(content()) as endpoint:
        broken = OutputDirectory((tmp_path / "broken").as_uri(), "broken")
        broken.begin()
        broken.put_bytes(b"{}", "model/config.json")
        broken.commit(Manifest(stage="merge_lora", fingerprint="b", library_version="0", config={}))
        from shellv_core.tracking.registry import ModelRegistry

        registered = ModelRegistry("tiny").register(broken.uri, "b", "b", {})
        ModelRegistry("tiny").set_alias("champion", registered.version)
        wait_for(lambda: "cannot load the model" in endpoint.engine.health().reason, 60)
        assert httpx.get(f"{endpoint.url}/readyz").status_code == 200
        assert ask(endpoint.url) == first
        third = registry(3)
        wait_for(lambda: ask(endpoint.url) == third, 60)
