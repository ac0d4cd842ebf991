from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from shellv_core.cluster import rollout
from shellv_core.cluster.connection import APPLY, DEPLOYMENTS, ApiError, Cluster
from shellv_core.config import build_config
from shellv_core.endpoint.client import user_message
from shellv_core.errors import ClusterError, Preempted, ServingError
from shellv_core.stages import deployers
from shellv_core.stages.deploy import DeployConfig
from shellv_core.stages.deployers import DEPLOYERS, Champion
from tests.cluster.deployment_controller import DEFAULT, DeploymentController, deployment

STABLE, CANARY = "shellv-serve", "shellv-serve-canary"


def champion(version: int) -> Champion:
    return Champion("models:/shellv@champion", f"models:/shellv/{version}", str(version), f"revision {version}")


@pytest.fixture(scope="module")
def models() -> Iterator[str]:
    """Servers of versions 1 to 4, at /1 to /4, which answer with their version."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.reply({"data": [{"id": "shellv", "revision": f"revision {self.path[1]}"}]})

        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            self.reply({"choices": [{"message": {"content": f"I am {self.path[1]}"}}]})

        def reply(self, content):
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()


@pytest.fixture
def controller(api, models, monkeypatch, caplog) -> DeploymentController:
    """A cluster that serves version 1 from two replicas by the platform's settings, with an idle canary."""
    caplog.set_level("INFO", "shellv_core")
    monkeypatch.setattr(rollout, "FAULT_GRACE_SECONDS", 0.0)
    monkeypatch.setattr(rollout, "LOG_INTERVAL_SECONDS", 0.0)
    monkeypatch.setattr(deployers, "POLL_SECONDS", 0.01)
    monkeypatch.setattr(deployers, "SERVICE_SECONDS", 0.5)
    servers = {f"models:/shellv/{version}": f"{models}/{version}" for version in (1, 2, 3, 4)}
    made = DeploymentController(api, {DEFAULT: f"{models}/1", **servers})
    api.put("deployments", deployment(STABLE, "stable", 2))
    api.put("deployments", deployment(CANARY, "canary", 0))
    return made


@contextlib.contextmanager
def deploying(version: int, **values):
    config = build_config(DeployConfig, {"target": "kubernetes", "startup_timeout_seconds": 60, **values})
    with DEPLOYERS["kubernetes"](config, champion(version)) as deployed:
        yield deployed


def deploy(version: int, **values) -> str:
    """Deploy, asking what the stage would; returns the answer."""
    import asyncio

    with deploying(version, **values) as deployed:
        return asyncio.run(deployed.client.answer([user_message("Who?")]))


def spec(api, name):
    return api.objects["deployments", name]["spec"]


def model(api, name):
    return rollout.model_of(api.objects["deployments", name])


def test_a_good_version_goes_by_the_canary_to_the_stable_track(api, controller, caplog):
    before = spec(api, STABLE)
    with deploying(2) as deployed:
        assert controller.answering == {STABLE: DEFAULT, CANARY: "models:/shellv/2"}
        assert deployed.details["asked"] == CANARY
        assert "/services/http:shellv-serve-canary:8000/proxy" in deployed.client.url
    assert controller.answering == {STABLE: "models:/shellv/2", CANARY: None}
    after = spec(api, STABLE)
    assert after["replicas"] == 2, "the number of stable replicas is the autoscaler's"
    container, was = (each["template"]["spec"]["containers"][0] for each in (after, before))
    assert container.pop("env") == [*was.pop("env"), {"name": "SHELLV_MODEL", "value": "models:/shellv/2"}]
    assert container == was
    assert after["template"]["metadata"]["labels"]["shellv.dev/version"] == "2"
    assert after["selector"] == before["selector"]
    assert spec(api, CANARY)["replicas"] == 0
    owned = {path[-1] for path in api.owners["deployments", STABLE]["shellv-deploy"]}
    assert owned == {"shellv.dev/version", "name", "value"}
    assert "shellv-serve goes from its default to models:/shellv/2" in caplog.text


def test_what_is_stable_already_is_asked_and_not_rolled_out(api, controller):
    deploy(2)
    patches = api.asked["apps", "deployments", "patch"]
    with deploying(2) as deployed:
        assert deployed.details["asked"] == STABLE
    assert api.asked["apps", "deployments", "patch"] == patches
    assert deploy(3) == "I am 3"
    assert (
        api.objects["deployments", STABLE]["metadata"]["annotations"]["shellv.dev/previous-model"] == "models:/shellv/2"
    )


def test_a_wrong_answer_leaves_the_stable_track_alone(api, controller):
    deploy(2)
    generation = api.objects["deployments", STABLE]["metadata"]["generation"]
    with pytest.raises(ServingError, match="wrong"), deploying(3):
        raise ServingError("wrong")
    assert api.objects["deployments", STABLE]["metadata"]["generation"] == generation
    assert controller.answering == {STABLE: "models:/shellv/2", CANARY: None}


@pytest.mark.parametrize(
    ("behaviour", "said"),
    [
        (
            "image",
            ["its pods cannot start", "ImagePullBackOff (Back-off pulling image", "event: Failed: image: told by"],
        ),
        ("crash", ["CrashLoopBackOff", "ended with code 1, Error", "log: shellv: cannot load the model"]),
        ("config", ['CreateContainerConfigError (configmap "shellv-serve" not found)']),
        ("deadline", ['"shellv-serve-canary-', "has timed out progressing"]),
        (
            "unschedulable",
            ["not done within 0.3 seconds", "Unschedulable (0/3 nodes are available: 3 Insufficient memory"],
        ),
        ("slow", ["not done within 0.3 seconds", "0/1 new pods available, 0 old ones left"]),
    ],
)
def test_a_canary_that_does_not_start_says_why_and_goes(api, controller, behaviour, said):
    controller.behaviours["models:/shellv/2"] = behaviour
    limit = 0.3 if "0.3 seconds" in said[0] else 60
    with pytest.raises(ServingError) as caught, deploying(2, startup_timeout_seconds=limit):
        raise AssertionError("it was rolled out")
    message = str(caught.value)
    assert message.startswith("the rollout of models:/shellv/2 on shellv-serve-canary failed: ")
    for each in said:
        assert each in message
    assert model(api, STABLE) is None
    assert controller.answering == {STABLE: DEFAULT, CANARY: None}
    assert spec(api, CANARY)["replicas"] == 0


def test_a_fault_that_passes_is_waited_for(api, controller, monkeypatch, caplog):
    monkeypatch.setattr(rollout, "FAULT_GRACE_SECONDS", 60.0)
    controller.behaviours["models:/shellv/2"] = "image"
    _later(caplog, "ImagePullBackOff", lambda: _mend(controller, CANARY))
    assert deploy(2) == "I am 2"


@pytest.mark.parametrize("track", [STABLE, CANARY])
def test_a_slow_rollout_is_reported_while_it_is_waited_for(api, controller, caplog, track):
    controller.behaviours[track, "models:/shellv/2"] = "slow"
    said = "0/1 new pods available, 0 old" if track == CANARY else "0/2 new pods available, 2 old ones left"
    _later(caplog, f"{track}: {said}", lambda: _mend(controller, track))
    assert deploy(2) == "I am 2"
    assert controller.answering[STABLE] == "models:/shellv/2"


@pytest.mark.parametrize("earlier", [None, "models:/shellv/2"])
@pytest.mark.parametrize("behaviour", ["crash", "deadline"])
def test_a_stable_track_that_fails_gets_its_version_back(api, controller, behaviour, earlier):
    if earlier:
        deploy(2)
    controller.behaviours[STABLE, "models:/shellv/3"] = behaviour
    with pytest.raises(ServingError, match=rf"(?s)on shellv-serve failed.*is back at {earlier or 'its default'}"):
        deploy(3)
    assert model(api, STABLE) == earlier
    assert controller.answering == {STABLE: earlier or DEFAULT, CANARY: None}
    assert spec(api, CANARY)["replicas"] == 0


def test_a_canary_that_serves_something_else(api, controller, models):
    controller.servers["models:/shellv/2"] = f"{models}/4"
    with pytest.raises(ServingError, match=r"did not take up .*it serves revision revision 4"):
        deploy(2)
    assert controller.answering == {STABLE: DEFAULT, CANARY: None}


@pytest.mark.parametrize("when", ["canary", "switch"])
def test_a_stage_that_was_killed_goes_on(api, controller, when):
    deploy(2)
    version = rollout.Version("models:/shellv/3", "3")
    cluster = Cluster()
    controller.behaviours["models:/shellv/3"] = "slow"
    cluster.apply(DEPLOYMENTS, rollout._manifest(CANARY, version, replicas=1), rollout.MANAGER)
    if when == "switch":
        switch = rollout._manifest(STABLE, version, previous="models:/shellv/2")
        cluster.apply(DEPLOYMENTS, switch, rollout.MANAGER)
    del controller.behaviours["models:/shellv/3"]
    for name in (STABLE, CANARY):
        controller.reconcile(name)
    assert deploy(3) == "I am 3"
    assert controller.answering == {STABLE: "models:/shellv/3", CANARY: None}


def test_a_stage_that_was_killed_in_the_switch_still_knows_what_to_go_back_to(api, controller):
    deploy(2)
    controller.behaviours[STABLE, "models:/shellv/3"] = "crash"
    switch = rollout._manifest(STABLE, rollout.Version("models:/shellv/3", "3"), previous="models:/shellv/2")
    Cluster().apply(DEPLOYMENTS, switch, rollout.MANAGER)
    with pytest.raises(ServingError, match="shellv-serve is back at models:/shellv/2"):
        deploy(3)
    assert model(api, STABLE) == "models:/shellv/2"


@pytest.mark.parametrize("track", [CANARY, STABLE])
def test_sigterm_leaves_nothing_behind(api, controller, caplog, track):
    deploy(2)
    controller.behaviours[track, "models:/shellv/3"] = "slow"
    _later(caplog, f"{track}: 0/", lambda: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(Preempted, match="run again to roll models:/shellv/3 out"):
        deploy(3)
    assert controller.answering == {STABLE: "models:/shellv/2", CANARY: None}
    assert model(api, STABLE) == "models:/shellv/2"


def test_a_restarting_server_and_cut_watches_change_nothing(api, controller):
    api.faults.extend(["reset", 503, 500, "reset"])
    api.cuts.extend([0, 1, 0, 0, 1])
    assert deploy(2) == "I am 2"
    assert controller.answering == {STABLE: "models:/shellv/2", CANARY: None}


def test_no_deployment(api):
    with pytest.raises(
        ClusterError, match="there is no Deployment shellv-serve in namespace elsewhere; apply one of k8s"
    ):
        deploy(2, namespace="elsewhere")


def test_the_fields_that_others_own_are_taken_only_by_force(api, controller):
    """Of the stand-in: without force the API names the owner."""
    api.put("deployments", deployment(STABLE, "stable", 2, "models:/shellv/1"))
    cluster, path = Cluster(), DEPLOYMENTS.path("shellv", STABLE)
    manifest = rollout._manifest(STABLE, rollout.Version("models:/shellv/2", "2"))
    with pytest.raises(ApiError, match=r'conflict with "kubectl": .*SHELLV_MODEL.*value') as caught:
        cluster.request("PATCH", path, manifest, {"fieldManager": "shellv-deploy"}, APPLY)
    assert (caught.value.status, caught.value.reason) == (409, "Conflict")
    cluster.apply(DEPLOYMENTS, manifest, rollout.MANAGER)
    assert model(api, STABLE) == "models:/shellv/2"


def _mend(controller, name):
    controller.behaviours.clear()
    controller.reconcile(name)


def _later(caplog, text, action):
    """Do something once the log says `text`."""

    def wait():
        deadline = time.monotonic() + 60
        while text not in caplog.text and time.monotonic() < deadline:
            time.sleep(0.002)
        action()

    threading.Thread(target=wait, daemon=True).start()
