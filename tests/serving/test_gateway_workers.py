"""Worker processes: killed, moved away from, restarted, and gone with the gateway."""

from __future__ import annotations

import json
import os
import signal
import threading

import httpx
import pytest

from shellv_core.errors import ServingError
from shellv_core.serving.gateway.config import ModelsFile
from shellv_core.serving.gateway.models import GatewayModels
from tests.serving.conftest import running_gateway
from tests.serving.gated_engine import wait_for

START_SECONDS = 250
LONG = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 3000, "stream": True}


def content(model_path, **entry):
    values = {"id": "tiny", "engine": "worker", "model": str(model_path), "start_seconds": START_SECONDS, **entry}
    return ModelsFile.model_validate({"models": [values]})


class Client(threading.Thread):
    """One streamed request; `events` are what came, `done` whether that was all."""

    def __init__(self, url, **body):
        super().__init__(daemon=True)
        self.url, self.body = url, {**LONG, **body}
        self.status, self.events = 0, []
        self.start()

    def run(self):
        with httpx.stream("POST", f"{self.url}/v1/chat/completions", json=self.body, timeout=120) as response:
            self.status = response.status_code
            for line in response.iter_lines():
                if line.startswith("data: "):
                    self.events.append(line.removeprefix("data: "))

    @property
    def tokens(self):
        return sum('"content": "' in each or '"content":"' in each for each in self.events[1:])

    def last(self):
        self.join(120)
        assert self.events[-1] == "[DONE]", self.events[-3:]
        return json.loads(self.events[-2])


@pytest.mark.slow
def test_kill_9_of_a_worker(model_path):
    options = {"slots": 1, "max_waiting": 8}
    with running_gateway(content(model_path, replicas=2, options=options)) as endpoint:
        line = endpoint.engine._lines["tiny"]
        engine, pool = line._current.running.engine, line._current.running.stop.__self__
        first, second = pool.workers
        assert endpoint.engine.health().ready
        assert httpx.get(f"{first.replica.url}/v1/models").status_code == 401

        # Both workers answer one request each; more wait behind them, without a token.
        talking = [Client(endpoint.url) for _ in range(2)]
        wait_for(lambda: all(client.tokens for client in talking), 60)
        wait_for(lambda: [each.outstanding for each in engine.replicas] == [1, 1] or len(talking) > 2, 60)
        waiting = [Client(endpoint.url, max_tokens=3, messages=[{"role": "user", "content": str(i)}]) for i in range(4)]
        wait_for(lambda: sum(each.outstanding for each in engine.replicas) == 6, 60)
        moved = first.replica.outstanding - 1
        killed = first.pid
        os.kill(killed, signal.SIGKILL)

        ends = [client.last() for client in talking]
        assert sorted("error" in end for end in ends) == [False, True]
        lost = next(end for end in ends if "error" in end)
        assert lost["error"]["type"] == "server_error"
        for client in waiting:
            assert client.last()["choices"][0]["finish_reason"] == "length"
            assert client.status == 200
        assert moved >= 1, "no request waited at the worker that was killed"

        # It is back by itself.
        wait_for(lambda: first.replica is not None and first.replica.ready, START_SECONDS)
        assert first.pid != killed
        assert len(engine.replicas) == 2
        assert Client(endpoint.url, max_tokens=2).last()["choices"][0]["finish_reason"] == "length"
        pids = [first.pid, second.pid]
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_a_worker_that_cannot_start_says_why(tmp_path):
    models = GatewayModels(content(tmp_path / "nowhere"))
    with pytest.raises(ServingError, match=r"(?s)ended before it was ready.*has no config.json"):
        models.await_first()
