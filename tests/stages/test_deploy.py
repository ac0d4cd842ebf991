from __future__ import annotations

import contextlib
import json
import shlex
import shutil
import subprocess
import threading
import urllib.request
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from shellv_core.config import build_config
from shellv_core.endpoint.client import EndpointClient
from shellv_core.errors import ConfigError, ServingError
from shellv_core.stages import deploy, deployers
from shellv_core.stages.deploy import DeployConfig
from shellv_core.stages.deployers import Champion, Deployment
from shellv_core.storage import InputDirectory, Manifest, OutputDirectory, home
from tests.serving.tiny_model import build_model, build_processor, picture


def commit(folder, name, fill):
    output = OutputDirectory((folder / name).as_uri(), name)
    output.begin()
    details = fill(output) or {}
    output.commit(Manifest(stage=name, fingerprint=name, library_version="0", config={}, details=details))
    return output.uri


@pytest.fixture
def champion(tmp_path, tracking_store):
    """A function that registers a committed model as tiny@champion."""

    def register(fill=lambda output: output.put_bytes(b"{}", "model/config.json") and None):
        from shellv_core.tracking.runs import open_client

        uri = commit(tmp_path, "merged", fill)
        client = open_client()
        client.create_registered_model("tiny")
        version = client.create_model_version("tiny", source=uri)
        client.set_registered_model_alias("tiny", "champion", version.version)

    return register


@pytest.fixture
def config(tmp_path):
    """A function that builds settings: a red picture, and what is given."""

    def build(**values):
        image = tmp_path / "red.png"
        image.write_bytes(picture("red"))
        defaults = {
            "output_uri": (tmp_path / "deployed").as_uri(),
            "image_uri": image.as_uri(),
            "startup_timeout_seconds": 250,
        }
        return build_config(DeployConfig, {**defaults, "registered_model": "tiny", **values})

    return build


@pytest.fixture
def fake_deployment(monkeypatch):
    """A deployer whose endpoint gives a fixed answer, and what happened to it."""
    seen = {"answer": "a red field", "taken_back": False, "revisions": [], "looks": 0}

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            seen["looks"] += self.path == "/v1/models"
            earlier = seen["revisions"].pop(0) if seen["revisions"] else None
            self.reply({"data": [{"id": "tiny", "revision": earlier or seen["champion"].revision}]})

        def do_POST(self):
            seen["request"] = json.loads(self.rfile.read(int(self.headers["content-length"])))
            self.reply({"choices": [{"message": {"content": seen["answer"]}}]})

        def reply(self, content):
            body = json.dumps(content).encode()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    seen["url"] = f"http://127.0.0.1:{server.server_port}"

    @contextlib.contextmanager
    def deployer(config, champion):
        seen["champion"] = champion
        try:
            yield Deployment(EndpointClient(seen["url"]), {"place": "nowhere"})
        except BaseException:
            seen["taken_back"] = True
            raise

    monkeypatch.setitem(deploy.DEPLOYERS, "local", deployer)
    yield seen
    server.shutdown()


@pytest.fixture
def tiny_champion(tmp_path, champion):
    processor = build_processor()
    build_model(processor).save_pretrained(tmp_path / "model")
    processor.save_pretrained(tmp_path / "model")
    champion(lambda output: output.put_tree(tmp_path / "model", "model") and None)


@pytest.mark.usefixtures("tiny_champion")
def test_a_real_server_answers_and_is_gone_afterwards(config):
    result = deploy.run(config(max_answer_tokens=8))
    details = result.details
    assert details["answer"]
    assert (details["model"], details["version"], details["target"]) == ("models:/tiny@champion", "1", "local")
    assert len(details["revision"]) == 64
    assert details["serve"] == "shellv serve --model models:/tiny@champion"
    assert "http://127.0.0.1:8000/v1/chat/completions" in details["curl"]
    assert result.metrics["startup_seconds"] > 0
    log = (home() / "logs" / "serve.log").read_text()
    assert "stopping" in log
    assert "Traceback" not in log
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if str(home()).encode() in (process / "environ").read_bytes():
                assert b"\0serve\0" not in (process / "cmdline").read_bytes()


@pytest.mark.usefixtures("tiny_champion")
@pytest.mark.skipif(shutil.which("curl") is None, reason="no curl on this machine")
def test_a_server_that_is_kept_answers_the_curl_line(config):
    details = deploy.run(config(max_answer_tokens=8, keep_running=True)).details
    try:
        asked = subprocess.run(shlex.split(details["curl"]), capture_output=True, timeout=60, check=True)
        assert json.loads(asked.stdout)["choices"][0]["message"]["content"].strip() == details["answer"]
        with urllib.request.urlopen(f"{details['url']}/ui/", timeout=60) as page:
            assert page.status == 200
    finally:
        subprocess.run(shlex.split(details["stop"]), check=True)


def test_the_first_validation_picture_is_asked_about(tmp_path, champion, config, fake_deployment):
    from tests.data.test_preparation import SCENES, prepared

    champion()
    data = prepared(tmp_path / "data", scenes=SCENES)
    promotion = commit(tmp_path, "promoted", lambda output: output.put_bytes(b"{}", "verdict.json") and None)
    result = deploy.run(config(image_uri=None, data_uri=data.uri, promotion_uri=promotion, question="What is it?"))
    assert result.details["answer"] == "a red field"
    assert result.details["place"] == "nowhere"
    assert (fake_deployment["champion"].alias, fake_deployment["champion"].pinned) == (
        "models:/tiny@champion",
        "models:/tiny/1",
    )
    parts = fake_deployment["request"]["messages"][0]["content"]
    assert parts[0]["image_url"]["url"].startswith("data:image/")
    assert parts[1]["text"] == "What is it?"
    output = InputDirectory(result.output_uri)
    request = json.loads(output.fetch("request.json").read_text())
    assert request == fake_deployment["request"] == json.loads((home() / "deploy" / "request.json").read_text())
    assert set(output.manifest.inputs) == {"data", "promotion"}


def test_it_runs_every_time(champion, config, fake_deployment):
    champion()
    first = deploy.run(config())
    fake_deployment["answer"] = "another"
    second = deploy.run(config())
    assert (first.details["answer"], second.details["answer"]) == ("a red field", "another")
    assert not second.reused


def test_an_empty_answer_takes_the_deployment_back(champion, config, fake_deployment):
    champion()
    fake_deployment["answer"] = " \n"
    with pytest.raises(ServingError, match="answers 'What is in this picture\\?' with nothing"):
        deploy.run(config())
    assert fake_deployment["taken_back"]


def test_golden_questions(champion, config, fake_deployment):
    champion()
    golden = [{"question": "Color?", "expected": "RED"}, {"question": "Animal?", "expected": "a cat"}]
    assert deploy.run(config(golden=golden, golden_share=0.5)).metrics["golden_share"] == 0.5
    said = r"50% of the golden questions .*golden_share=1 is needed.*'Animal\?' with 'a red field', expected 'a cat'"
    with pytest.raises(ServingError, match=said):
        deploy.run(config(golden=golden, output_uri=(home() / "second").as_uri()))
    assert fake_deployment["taken_back"]
    assert fake_deployment["request"]["messages"][0]["content"][1]["text"] == "Animal?"


def test_no_champion(config, fake_deployment):
    with pytest.raises(ServingError, match=r"models:/tiny@champion names no registered version.*Run promote first"):
        deploy.run(config())
    assert "champion" not in fake_deployment


def test_a_server_of_another_model_is_not_taken_for_the_champion(champion, config, fake_deployment):
    champion()
    fake_deployment["revisions"] = ["f" * 64]
    with pytest.raises(ServingError, match=f"serves revision {'f' * 12}, but models:/tiny@champion is version 1"):
        deploy.run(config())
    assert fake_deployment["taken_back"]


def expected_revision():
    from shellv_core.serving.reference import find_registered, registered_revision

    return registered_revision(find_registered("models:/tiny@champion"))


def test_a_server_elsewhere_is_waited_for_until_it_has_followed_the_alias(
    champion, config, fake_deployment, monkeypatch
):
    monkeypatch.setattr(deployers, "POLL_SECONDS", 0.01)
    champion()
    fake_deployment["champion"] = Champion("", "", "1", expected_revision())
    fake_deployment["revisions"] = ["0" * 64] * 3
    details = deploy.run(config(target="service", url=fake_deployment["url"])).details
    assert details["answer"] == "a red field"
    assert details["revision"] == expected_revision()
    assert details["url"] == fake_deployment["url"]
    assert f"curl -s {fake_deployment['url']}/v1/chat/completions" in details["curl"]
    assert fake_deployment["looks"] == 5  # three earlier ones, the promoted one, and once more when it is asked


@pytest.mark.parametrize("there", [True, False])
def test_a_server_elsewhere_that_does_not_follow(champion, config, fake_deployment, monkeypatch, there):
    monkeypatch.setattr(deployers, "POLL_SECONDS", 0.01)
    champion()
    fake_deployment["champion"] = Champion("", "", "1", "0" * 64)
    url = fake_deployment["url"] if there else "http://127.0.0.1:9"
    reason = "it serves revision 000000000000" if there else "does not answer"
    with pytest.raises(ServingError, match=rf"did not take up models:/tiny@champion \(version 1.*{reason}"):
        deploy.run(config(target="service", url=url, startup_timeout_seconds=0.2))


def test_a_service_without_an_address(config):
    with pytest.raises(ConfigError, match="target=service needs url="):
        deploy.run(config(target="service"))


def test_an_unknown_target(config):
    said = "target='nowhere' is not a place to deploy to; allowed: local, service, kubernetes"
    with pytest.raises(ConfigError, match=said):
        deploy.run(config(target="nowhere"))


def test_no_picture_and_no_data(config):
    with pytest.raises(ConfigError, match="data_uri=URI"):
        deploy.run(config(image_uri=None))


def test_a_server_that_dies_shows_its_last_words(champion, config):
    champion()
    with pytest.raises(
        ServingError, match=r"(?s)the server ended with code 1 before it was up:.*cannot load the model"
    ):
        deploy.run(config())
