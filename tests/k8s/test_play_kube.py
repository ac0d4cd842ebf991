"""The serving Deployment of `dev`, its ConfigMaps, Secret and claim in real containers, by `podman play kube`.

Podman starts what a Deployment describes, under its security context and limits, but it is no cluster: it makes no
Services, waits for no probe, leaves $(VARIABLE) in arguments as it is and wants the Secret as JSON. The test does the
last three itself.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from components.images import image
from pipelines.contained.hardening import limits
from tests.k8s.rendering import Manifest, named, render
from tests.k8s.stores import KEYS, free_ports, mlflow, object_store, services_at
from tests.serving.tiny_model import build_model, build_processor, data_url, picture

pytestmark = [pytest.mark.containers, pytest.mark.slow, pytest.mark.timeout(1500)]

HOST = "host.containers.internal"


def podman(*arguments: str, given: str | None = None) -> str:
    program = shutil.which("podman")
    assert program, "podman is missing"
    done = subprocess.run([program, *arguments], input=given, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, f"podman {' '.join(arguments)}: {done.stderr}"
    # A container's own errors are in the second when its log is asked for.
    return done.stdout + done.stderr


def bound_by_this_machine(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let podman ask for no more open files than this machine allows, as `pipelines.contained` does."""
    ulimits = [f"{name}={limit}:{limit}" for name, limit in limits().items()]
    path.write_text(f"[containers]\ndefault_ulimits = {json.dumps(ulimits)}\n")
    monkeypatch.setenv("CONTAINERS_CONF", str(path))


def champion(folder: Path, monkeypatch: pytest.MonkeyPatch, environment: dict[str, str]) -> str:
    """Commit a tiny model to the object store and register it as shellv-nano@champion; gives its revision."""
    from shellv_core.serving.reference import fetch_model
    from shellv_core.storage import Manifest as OutputManifest
    from shellv_core.storage import OutputDirectory
    from shellv_core.tracking.runs import open_client

    processor = build_processor()
    build_model(processor).save_pretrained(folder)
    processor.save_pretrained(folder)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    output = OutputDirectory("s3://shellv/runs/merge_lora", "f")
    output.begin()
    output.put_tree(folder, "model")
    output.commit(OutputManifest(stage="merge_lora", fingerprint="f", library_version="0", config={}))
    client = open_client()
    client.create_registered_model("shellv-nano")
    version = client.create_model_version("shellv-nano", source="s3://shellv/runs/merge_lora")
    client.set_registered_model_alias("shellv-nano", "champion", version.version)
    return fetch_model(str(folder)).revision


def playable(services: dict[str, str]) -> list[Manifest]:
    """The objects of `dev` that the server needs, at this test's addresses and at free ports of this machine."""
    objects = render("k8s/overlays/dev")
    deployment = named(objects, "Deployment", "shellv-serve")
    settings, places = named(objects, "ConfigMap", "shellv-serve"), named(objects, "ConfigMap", "shellv-services")
    places["data"] = services
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    container["image"] = image("serve")
    for port, free in zip(container["ports"], free_ports(len(container["ports"])), strict=True):
        port["hostPort"] = free
    container["args"] = [expanded(each, settings["data"]) for each in container["args"]]
    return [settings, places, named(objects, "PersistentVolumeClaim", "shellv-serve-cache"), deployment]


def expanded(argument: str, values: dict[str, str]) -> str:
    """As the kubelet does it."""
    for name, value in values.items():
        argument = argument.replace(f"$({name})", value)
    return argument


@contextlib.contextmanager
def playing(objects: list[Manifest], path: Path) -> Iterator[str]:
    """Start the objects; yields the name of the server's container."""
    path.write_text(yaml.safe_dump_all(objects))
    secret = {key: base64.b64encode(value.encode()).decode() for key, value in KEYS.items()}
    with contextlib.ExitStack() as undo:
        podman("secret", "create", "shellv-storage", "-", given=json.dumps(secret))
        undo.callback(podman, "secret", "rm", "shellv-storage")
        undo.callback(podman, "volume", "rm", "--force", "shellv-serve-cache")
        undo.callback(podman, "play", "kube", "--down", str(path))
        podman("play", "kube", str(path))
        yield "shellv-serve-pod-0-serve"


def address(container: dict[str, Any], name: str) -> str:
    """Where this machine reaches a named port."""
    [port] = [each["hostPort"] for each in container["ports"] if each["name"] == name]
    return f"http://127.0.0.1:{port}"


def probe(container: dict[str, Any], kind: str) -> int:
    """The status of a probe as the kubelet would see it; 0 where nothing answers."""
    action = container[kind]
    try:
        url = address(container, action["httpGet"]["port"]) + action["httpGet"]["path"]
        with urllib.request.urlopen(url, timeout=action.get("timeoutSeconds", 1)) as answer:
            return int(answer.status)
    except urllib.error.HTTPError as error:
        return error.code
    except OSError:
        return 0


def start_up(container: dict[str, Any], name: str) -> None:
    """Probe as the kubelet does, until the server has started or has had its time."""
    action = container["startupProbe"]
    deadline = time.monotonic() + action["periodSeconds"] * action["failureThreshold"]
    while probe(container, "startupProbe") != 200:
        facts = json.loads(podman("inspect", name))[0]
        if facts["RestartCount"] or time.monotonic() > deadline:
            pytest.fail(f"{name} does not start:\n{podman('logs', name)[-3000:]}")
        time.sleep(1)


def test_the_deployment_starts_and_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openai import OpenAI

    bound_by_this_machine(tmp_path / "containers.conf", monkeypatch)
    with object_store(tmp_path / "s3") as s3, mlflow(tmp_path / "mlflow", s3, HOST, "127.0.0.1") as tracking:
        here = services_at(f"http://127.0.0.1:{s3}", f"http://127.0.0.1:{tracking}")
        revision = champion(tmp_path / "model", monkeypatch, {**KEYS, **here})
        objects = playable(services_at(f"http://{HOST}:{s3}", f"http://{HOST}:{tracking}"))
        [container] = objects[-1]["spec"]["template"]["spec"]["containers"]
        with playing(objects, tmp_path / "play.yaml") as name:
            start_up(container, name)
            assert probe(container, "readinessProbe") == probe(container, "livenessProbe") == 200

            client = OpenAI(base_url=f"{address(container, 'http')}/v1", api_key="none", max_retries=0)
            [model] = client.models.list().data
            assert (model.id, model.revision) == ("shellv", revision)  # type: ignore[attr-defined]
            question: Any = [
                {"type": "text", "text": "What is in this picture?"},
                {"type": "image_url", "image_url": {"url": data_url(picture())}},
            ]
            answer = client.chat.completions.create(
                model="shellv", messages=[{"role": "user", "content": question}], max_tokens=8, temperature=0
            )
            assert answer.usage is not None
            assert answer.usage.completion_tokens == 8

            holds_what_the_manifest_promises(name, container)
            # The model lies on the claim, for the next pod.
            volume = Path(json.loads(podman("volume", "inspect", "shellv-serve-cache"))[0]["Mountpoint"])
            assert [path.name for path in volume.rglob("config.json")] == ["config.json"]

            podman("stop", "--time", "45", name)
            assert json.loads(podman("inspect", name))[0]["State"]["ExitCode"] == 0


def holds_what_the_manifest_promises(name: str, container: dict[str, Any]) -> None:
    """User, capabilities, privileges, root and limits of the running process, as its kernel sees them."""
    script = (
        "import json, os, pathlib\n"
        "status = dict(line.split(':\\t') for line in pathlib.Path('/proc/1/status').read_text().splitlines())\n"
        "folders = ('/', '/etc', '/opt/venv', '/usr', '/var', '/cache', '/tmp')\n"
        "writable = [each for each in folders if os.access(each, os.W_OK)]\n"
        "print(json.dumps([status['Uid'], status['CapEff'], status['NoNewPrivs'], status['Seccomp'], writable]))\n"
    )
    user, capabilities, no_new_privileges, seccomp, writable = json.loads(podman("exec", name, "python3", "-c", script))
    assert user.split() == ["10001"] * 4
    assert int(capabilities, 16) == 0
    assert (no_new_privileges, seccomp) == ("1", "2")
    assert writable == ["/cache", "/tmp"]
    limit = json.loads(podman("inspect", name))[0]["HostConfig"]["Memory"]
    assert limit == int(container["resources"]["limits"]["memory"].removesuffix("Gi")) << 30
