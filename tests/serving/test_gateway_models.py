"""``models.yaml``: what it may say, splits of traffic, shadows, and what a change of it does."""

from __future__ import annotations

import collections

import httpx
import pytest
import yaml

from shellv_core.config import build_config
from shellv_core.errors import ConfigError
from shellv_core.serving.gateway.config import ModelsFile, RouteEntry, read_models
from shellv_core.serving.gateway.models import _draw
from tests.serving.conftest import running_gateway
from tests.serving.gated_engine import wait_for

USER = {"role": "user", "content": "hello"}


@pytest.mark.parametrize(
    ("models", "routes", "message"),
    [
        ([], [], "models.*at least 1"),
        ([{"id": "a"}], [], "a model reference is needed"),
        ([{"id": "a", "model": "x", "engin": "http"}], [], "did you mean 'engine'"),
        ([{"id": "a", "engine": "http"}], [], "needs urls"),
        ([{"id": "a", "engine": "http", "urls": ["localhost:8000"]}], [], "not an address like http://HOST:PORT"),
        ([{"id": "a", "model": "x", "urls": ["http://h:1"]}], [], "urls belong to engine: http"),
        ([{"id": "a", "model": "x", "replicas": 2}], [], "belong to worker"),
        ([{"id": "a", "engine": "http", "urls": ["http://h:1"], "adapters": {"b": "x"}}], [], "own adapters"),
        ([{"id": "a", "model": "x"}, {"id": "a", "model": "y"}], [], "'a' names two things"),
        ([{"id": "a", "model": "x", "adapters": {"b": "x"}}, {"id": "b", "model": "y"}], [], "'b' names two things"),
        ([{"id": "stable", "model": "x"}], [{"id": "r", "weights": {"stabel": 1}}], "did you mean 'stable'"),
        ([{"id": "a", "model": "x"}], [{"id": "r", "weights": {"a": 0}}], "one weight at least"),
        ([{"id": "a", "model": "x", "quantization": "int4"}], [], "'nf4' or 'int8'"),
    ],
)
def test_what_is_wrong_is_said(models, routes, message):
    with pytest.raises(ConfigError, match=message):
        build_config(ModelsFile, {"models": models, "routes": routes})


def test_users_stay_where_they_are_and_weights_hold():
    before = RouteEntry(id="chat", weights={"stable": 95, "canary": 5})
    after = RouteEntry(id="chat", weights={"stable": 80, "canary": 20})
    users = [f"user {number}" for number in range(4000)]
    first = {user: _draw(before, user) for user in users}
    second = {user: _draw(after, user) for user in users}
    assert first == {user: _draw(before, user) for user in users}
    assert 140 < collections.Counter(first.values())["canary"] < 260
    assert 690 < collections.Counter(second.values())["canary"] < 910
    assert all(second[user] == "canary" for user in users if first[user] == "canary")
    drawn = collections.Counter(_draw(before, None) for _ in range(4000))
    assert 130 < drawn["canary"] < 270
    assert {_draw(RouteEntry(id="chat", weights={"a": 0, "b": 1}), user) for user in users} == {"b"}


@pytest.fixture
def two_models(model_path, tmp_path, processor):
    """``models.yaml`` with two models of different weights, one split between them, and one of them in the shadow."""
    from tests.serving.tiny_model import build_model

    other = tmp_path / "other"
    model = build_model(processor)
    model.lm_head.weight.data *= 0.5
    model.save_pretrained(other)
    processor.save_pretrained(other)
    content = {
        "models": [{"id": "stable", "model": str(model_path)}, {"id": "canary", "model": str(other)}],
        "routes": [{"id": "chat", "weights": {"stable": 50, "canary": 50}}],
    }
    path = tmp_path / "models.yaml"
    path.write_text(yaml.safe_dump(content, sort_keys=False))
    return path, content


def test_a_split_a_shadow_and_a_change_of_the_file(two_models):
    path, content = two_models
    with running_gateway(read_models(path)) as endpoint:
        models = endpoint.engine
        models._reread = lambda: read_models(path)

        def ask(**body):
            response = httpx.post(
                f"{endpoint.url}/v1/chat/completions", json={"messages": [USER], "max_tokens": 2, **body}, timeout=60
            )
            return response.headers.get("x-model-revision"), response

        cards = httpx.get(f"{endpoint.url}/v1/models").json()["data"]
        assert [(card["id"], card["parent"]) for card in cards] == [
            ("stable", None), ("canary", None), ("chat", "stable"),
        ]  # fmt: skip
        stable, canary = (card["revision"] for card in cards[:2])
        by_user = {user: ask(user=user)[0] for user in map(str, range(12))}
        assert set(by_user.values()) == {stable, canary}
        assert by_user == {user: ask(user=user, model="chat")[0] for user in by_user}
        assert ask(model="chat")[1].json()["model"] == "chat"

        def finished():
            return {model.name: model.engine.stats().finished for model in models.list() if not model.parent}

        held = models.find("canary")
        content["routes"][0] |= {"weights": {"stable": 1}, "shadow": {"model": "canary", "percent": 100}}
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        models.reload()
        assert models.find("canary") is held, "a model that did not change was loaded again"
        before = finished()["canary"]
        assert {ask(user=user)[0] for user in by_user} == {stable}
        wait_for(lambda: finished()["canary"] == before + len(by_user))

        path.write_text("models: [{id: stable}]")
        models.reload()
        assert ask(model="canary")[0] == canary, "a wrong file changed what is served"

        del content["routes"], content["models"][1]
        path.write_text(yaml.safe_dump(content, sort_keys=False))
        models.reload()
        assert ask(model="canary")[1].status_code == 404
        assert ask()[0] == stable
        engine = held.engine._engine
        assert engine._thread.is_alive(), "a revision ended that a request still holds"
        del held
        wait_for(lambda: not engine._thread.is_alive(), 60)
