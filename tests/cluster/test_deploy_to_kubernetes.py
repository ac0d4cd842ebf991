"""The whole deploy stage: registry, real servers of two versions behind the cluster's Services, and its record."""

from __future__ import annotations

import copy
import json

import pytest

from shellv_core.config import build_config
from shellv_core.errors import ServingError
from shellv_core.serving.server import ServeConfig, background_server
from shellv_core.stages import deploy, deployers
from shellv_core.stages.deploy import DeployConfig
from shellv_core.storage import InputDirectory, Manifest, OutputDirectory
from tests.cluster.deployment_controller import DeploymentController, deployment
from tests.serving.tiny_model import build_model, build_processor, picture


@pytest.fixture(scope="module")
def committed(tmp_path_factory) -> list[str]:
    """Outputs with two models that differ."""
    import torch

    processor = build_processor()
    model = build_model(processor)
    folder, uris = tmp_path_factory.mktemp("models"), []
    for number in (1, 2):
        with torch.no_grad():
            model.lm_head.weight.mul_(1 + number / 10)
        copy.deepcopy(model).save_pretrained(folder / f"model-{number}")
        processor.save_pretrained(folder / f"model-{number}")
        output = OutputDirectory((folder / f"merged-{number}").as_uri(), str(number))
        output.begin()
        output.put_tree(folder / f"model-{number}", "model")
        output.commit(Manifest(stage="merge_lora", fingerprint=str(number), library_version="0", config={}))
        uris.append(output.uri)
    return uris


@pytest.fixture
def registry(committed, tracking_store):
    """A function that makes a version the champion."""
    from shellv_core.tracking.runs import open_client

    client = open_client()
    client.create_registered_model("tiny")
    for uri in committed:
        client.create_model_version("tiny", source=uri)
    return lambda version: client.set_registered_model_alias("tiny", "champion", version)


def test_the_champion_is_rolled_out_by_its_version_and_answers(api, committed, registry, tmp_path, monkeypatch):
    monkeypatch.setattr(deployers, "POLL_SECONDS", 0.05)
    (tmp_path / "red.png").write_bytes(picture("red"))

    def config(name: str, **values) -> DeployConfig:
        image = {"image_uri": (tmp_path / "red.png").as_uri(), "output_uri": (tmp_path / name).as_uri()}
        settings = {"target": "kubernetes", "registered_model": "tiny", "max_answer_tokens": 4, **image, **values}
        return build_config(DeployConfig, settings)

    servers = [ServeConfig(model=uri, name="tiny", port=0, operations_port=None, ui=False) for uri in committed]
    with background_server(servers[0]) as first, background_server(servers[1]) as second:
        controller = DeploymentController(api, {"models:/tiny/1": first, "models:/tiny/2": second})
        api.put("deployments", deployment("shellv-serve", "stable", 2))
        api.put("deployments", deployment("shellv-serve-canary", "canary", 0))
        registry("1")
        result = deploy.run(config("first"))
        assert result.details["answer"]
        assert (result.details["version"], result.details["asked"]) == ("1", "shellv-serve-canary")
        assert result.details["url"].endswith("/services/http:shellv-serve:8000/proxy")
        assert controller.answering == {"shellv-serve": "models:/tiny/1", "shellv-serve-canary": None}

        registry("2")
        golden = [{"question": "Color?", "expected": "no model of this size says this"}]
        with pytest.raises(ServingError, match="0% of the golden questions"):
            deploy.run(config("second", golden=golden))
        assert controller.answering == {"shellv-serve": "models:/tiny/1", "shellv-serve-canary": None}

        again = deploy.run(config("third"))
        assert again.details["revision"] != result.details["revision"]
        assert controller.answering == {"shellv-serve": "models:/tiny/2", "shellv-serve-canary": None}
    request = json.loads(InputDirectory(again.output_uri).fetch("request.json").read_bytes())
    assert request["messages"][0]["content"][0]["type"] == "image_url"
