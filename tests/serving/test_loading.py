"""Quantized models and adapters, through the same functions as `shellv serve`."""

from __future__ import annotations

import argparse
import asyncio

import pytest
import torch

from shellv_core.errors import ConfigError, ServingError
from shellv_core.models.config import LoraConfig
from shellv_core.models.lora import add_lora, save_adapter
from shellv_core.serving import serve_command
from shellv_core.serving.engine import GenerationRequest, ImagePart, Message, TextPart
from shellv_core.serving.inference.adapters import AdapterSet
from shellv_core.serving.inference.loading import load_served
from shellv_core.serving.reference import fetch_adapter
from shellv_core.serving.transformers_engine import EngineConfig, TransformersEngine
from tests.serving.requests_at_random import generate, picture, random_requests
from tests.serving.test_slots_equality import answer_all, save_random_adapter
from tests.serving.tiny_model import build_model


def answers(directory, requests, adapters=None, batching="slots", **options):
    model, processor, adapter_set = load_served(directory, adapters=adapters, **options)
    engine = TransformersEngine(model, processor, EngineConfig(max_waiting=64, batching=batching), adapter_set)
    found, _ = asyncio.run(answer_all(engine, requests))
    return [token_ids for token_ids, _, _ in found], model


@pytest.fixture(scope="module")
def model_path(processor, tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    build_model(processor, width=64).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def adapter_files(processor, tmp_path_factory):
    directories = {f"adapter{seed}": tmp_path_factory.mktemp("adapter") for seed in (1, 2)}
    for seed, directory in enumerate(directories.values(), start=1):
        save_random_adapter(build_model(processor, width=64), directory, seed)
    return {name: fetch_adapter(str(directory)) for name, directory in directories.items()}


@pytest.mark.parametrize(("quantization", "layer"), [("nf4", "Linear4bit"), ("int8", "Linear8bitLt")])
def test_quantized_models_answer_on_the_cpu(model_path, adapter_files, quantization, layer):
    requests = random_requests(6, [None, *adapter_files], seed=3, longest=8)
    found, model = answers(model_path, requests, adapter_files, quantization=quantization)
    assert [len(token_ids) <= request.max_tokens for token_ids, request in zip(found, requests, strict=True)]
    assert all(found)
    kinds = {
        name: type(getattr(module, "base_layer", module)).__name__
        for name, module in model.named_modules()
        if name.endswith(("_proj", "linear_1", "lm_head"))
    }
    assert {kind for name, kind in kinds.items() if ".language_model." in name} == {layer}
    # Quantized towers and heads cost quality and save next to nothing.
    assert {kind for name, kind in kinds.items() if ".language_model." not in name} == {"Linear"}
    # What 8 bits round an activation to changes with its last bits, and these with what else is in the batch.
    batching = "serial" if quantization == "int8" else "slots"
    first, second = (
        answers(model_path, requests, adapter_files, batching, quantization=quantization)[0] for _ in range(2)
    )
    assert first == second


def test_bfloat16_answers(model_path):
    found, model = answers(model_path, random_requests(4, [None], seed=4, longest=8), dtype="bfloat16")
    assert model.dtype == torch.bfloat16
    assert all(found)


def test_dora_adapters_are_mixed_batch_by_batch(processor, model, tmp_path):
    from shellv_core.models.lora import load_adapter

    for seed, dora in [(1, True), (2, False)]:
        save_random_adapter(build_model(processor), tmp_path / f"adapter{seed}", seed, dora)
    directories = {each.name: each for each in sorted(tmp_path.iterdir())}
    requests = random_requests(9, [None, *directories], seed=5, longest=8)
    served = build_model(processor)
    engine = TransformersEngine(served, processor, EngineConfig(), AdapterSet(served, directories))
    found, _ = asyncio.run(answer_all(engine, requests))
    alone = {name: load_adapter(build_model(processor), directory) for name, directory in directories.items()}
    for request, (token_ids, _, reason) in zip(requests, found, strict=True):
        expected = generate(alone.get(request.adapter, model), processor, request)
        assert token_ids == (expected[: len(token_ids)] if reason == "stop" else expected)


def test_an_adapter_changes_the_answer_and_is_listed(model_path, adapter_files, processor):
    import random

    parts = (ImagePart(picture(random.Random(0))), TextPart("what is this ?"))
    asked = [
        GenerationRequest((Message("user", parts),), adapter=name, max_tokens=12) for name in (None, *adapter_files)
    ]
    found, _ = answers(model_path, asked, adapter_files)
    assert len({tuple(token_ids) for token_ids in found}) == 3
    _, _, adapter_set = load_served(model_path, adapters=adapter_files)
    assert [info.name for info in adapter_set.infos] == list(adapter_files)
    assert all(len(info.revision) == 64 for info in adapter_set.infos)


def test_an_adapter_of_another_model_is_refused(processor, model_path, tmp_path):
    from shellv_core.errors import ModelError

    save_adapter(add_lora(build_model(processor, backbone="starcoder2"), LoraConfig(r=2)), tmp_path, "base")
    with pytest.raises(ModelError, match="does not fit its base model"):
        load_served(model_path, adapters={"other": fetch_adapter(str(tmp_path))})


def test_devices_that_are_not_there(model_path):
    with pytest.raises(ServingError, match=r"device 'gpu' is unknown; did you mean 'cpu'"):
        load_served(model_path, device="gpu")
    if not torch.cuda.is_available():
        with pytest.raises(ServingError, match="device 'cuda:1' is not there; this machine has: cpu"):
            load_served(model_path, device="cuda:1")


def test_a_folder_without_an_adapter(tmp_path):
    with pytest.raises(ServingError, match=r"it has no adapter_config\.json"):
        fetch_adapter(str(tmp_path))


def parsed(*arguments):
    parser = argparse.ArgumentParser()
    serve_command.add_arguments(parser)
    return parser.parse_args(["--model", "m", *arguments])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--adapter", "poet"], "--adapter 'poet' is not of the form NAME=REFERENCE"),
        (["--adapter", "a=x", "--adapter", "a=y"], "--adapter names 'a' twice"),
        (["--slots", "0"], "slots"),
    ],
)
def test_arguments_that_make_no_sense(arguments, message):
    with pytest.raises(ConfigError, match=message):
        serve_command.main(parsed(*arguments))
