"""Tiny runs through the loop, in one process and in several, for `test_engines` and `test_deepspeed`."""

from __future__ import annotations

import dataclasses
import os
from datetime import timedelta
from pathlib import Path

import pytest
import torch
from torch import distributed

from shellv_core.data.samples import Sample
from shellv_core.models.config import LoraConfig
from shellv_core.models.hacl import HaclHeads
from shellv_core.models.lora import add_lora
from shellv_core.storage import InputDirectory
from shellv_core.training.config import HaclConfig, PreferenceConfig, TrainingConfig
from shellv_core.training.engines import deepspeed as zero
from shellv_core.training.examples import image_bytes, tokenize_samples
from shellv_core.training.features import CachedFeatures, pixel_batches, tower_features
from shellv_core.training.fit import TrainingData, fit
from shellv_core.training.loop import PaddedFeed, StepData, set_trainable, train_from
from shellv_core.training.model import TrainingModel, frozen_copy
from shellv_core.training.processes import num_processes, rank
from tests.training.tiny import CLIP, tiny_model, tiny_samples

STEPS = 5
HACL = HaclConfig(weight=0.5, num_hallucinated=2, queue_size=11, text_margin_weight=0.5, text_margin=1.0)


@dataclasses.dataclass(frozen=True)
class Case:
    """One run: `training` changes the settings, `micro` is the micro-batch of all processes together."""

    training: dict = dataclasses.field(default_factory=dict)
    hacl: HaclConfig | None = HACL
    lora: bool = False
    micro: int | None = None
    few_images: bool = False
    preference: float = 0.0
    #: The model is stored in bfloat16.
    half: bool = False
    #: Each process divides its loss by its own labels, as if all had as many.
    fault: bool = False
    #: Stop, as if killed, after this step.
    stop: int | None = None


CASES = {
    "full": Case(),
    # 17 conversations: of an epoch's last step, with one, the second process gets nothing.
    "adapters, accumulation": Case({"global_batch_size": 8}, lora=True, micro=4),
    "few images": Case({"global_batch_size": 4}, few_images=True),
    "few images, adapters": Case(few_images=True, lora=True, micro=2),
    "packed": Case({"packing": True, "pack_tokens": 128, "max_length": 128, "global_batch_size": 8}, None),
    "packed, own contrast": Case(
        {"packing": True, "pack_tokens": 128, "max_length": 128, "global_batch_size": 4},
        HaclConfig(weight=0.5, gather=False),
        lora=True,
    ),
    # Against a frozen copy; an epoch's last step leaves the second process nothing.
    "packed, preference": Case(
        {"packing": True, "pack_tokens": 128, "max_length": 128, "global_batch_size": 4}, None, preference=0.5
    ),
}
HALF = Case(
    {"packing": True, "pack_tokens": 128, "max_length": 128, "global_batch_size": 8, "precision": "bf16"},
    HaclConfig(weight=0.5, gather=False),
    lora=True,
    half=True,
)

#: Measured, not computed.
RATES = ("samples_per_second", "tokens_per_second", "peak_memory_gb", "data_wait_share", "mfu", "useful_token_share")


class Killed(Exception):
    """Stands for a kill."""


class OwnLabels(PaddedFeed):
    """The fault that `Case.fault` names."""

    def steps(self, first, position):
        for data in super().steps(first, position):
            parts = list(data.parts)
            labels = sum(len(part.batch.label_ids) for part in parts)
            yield StepData(parts, data.num_parts, num_processes() * labels)


def samples_of(case: Case) -> list[Sample]:
    if not case.few_images:
        return tiny_samples()
    words = [
        Sample(
            key=f"t{number}",
            id=f"t{number}",
            conversations=[{"from": "human", "value": f"Say {number}."}, {"from": "gpt", "value": f"It is {number}."}],
            source="test",
        )
        for number in range(14)
    ]
    return [*tiny_samples(4, with_text_only=False)[:2], *words]


def run(case: Case, directory: Path, shards: str | None = None) -> dict:
    """The metrics of every step, and what it ends with."""
    settings = TrainingConfig(
        **{
            "global_batch_size": 6,
            "max_steps": STEPS,
            "trainable": ("projector", "language_model"),
            "projector_learning_rate": 1e-3,
            "language_model_learning_rate": 1e-3,
            "log_every_steps": 1,
            "checkpoint_every_steps": 1,
            "max_length": 256,
            "micro_batch_size": case.micro and case.micro // num_processes(),
            **case.training,
        }
    )
    samples = samples_of(case)
    model, processor = tiny_model(CLIP, samples=tiny_samples())
    torch.manual_seed(0)
    module = TrainingModel(
        model, case.hacl and HaclHeads(32), case.hacl, PreferenceConfig(weight=case.preference, prompt="What is it?")
    )
    set_trainable(module, settings)
    if case.preference and not case.lora:
        module.reference = frozen_copy(model)
    if case.half:
        model.to(torch.bfloat16)
    if case.lora:
        add_lora(model, LoraConfig(r=2))
    logged = []

    def log(metrics, step):
        logged.append(metrics)
        if step == case.stop:
            raise Killed

    try:
        if settings.packing:
            data = TrainingData.of(InputDirectory(shards), "train")
            details = fit(module, processor, data, settings, 0, directory, log, "test").details
        else:
            examples = tokenize_samples(
                samples, processor.tokenizer, processor.image_token_id, 4, 256, prompt="What is it?"
            )
            pictures = pixel_batches(image_bytes(samples), processor)
            features = CachedFeatures(torch.cat([tower_features(model, batch) for batch in pictures]))
            feed = (OwnLabels if case.fault else PaddedFeed)(module, examples, features, settings, 0)
            details = train_from(feed, module, settings, 0, directory, log).details
    except Killed:
        details = {}
    state = {name: tensor.detach().clone() for name, tensor in module.state_dict().items()}
    return {"metrics": logged, "state": state, "details": details}


def work(number: int, world: int, folder: str, cases: dict[str, Case], home: str, shards: str | None) -> None:
    """Compute `cases` as process `number` and leave them as ``NUMBER.pt`` in `folder`."""
    torch.set_num_threads(1)
    # So that ZeRO-3 shards most of a tiny model.
    zero.PERSISTENCE_THRESHOLD = 50
    os.environ |= {"SHELLV_HOME": home, "LOCAL_RANK": str(number)}
    if world > 1:
        distributed.init_process_group(
            "gloo", init_method=f"file://{folder}/store", rank=number, world_size=world, timeout=timedelta(seconds=60)
        )
    found = {name: run(case, Path(folder) / name, shards) for name, case in cases.items()}
    assert world == 1 or rank() == number
    torch.save(found, Path(folder) / f"{number}.pt")
    if world > 1:
        distributed.destroy_process_group()


def spawn(world: int, folder: Path, cases: dict[str, Case], home: Path, shards: str | None = None) -> list[dict]:
    """What each of `world` new processes computed."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "store").unlink(missing_ok=True)
    torch.multiprocessing.spawn(work, (world, str(folder), cases, str(home), shards), nprocs=world)
    return [torch.load(folder / f"{number}.pt", weights_only=True) for number in range(world)]


def assert_same(found: dict, expected: dict) -> None:
    """The later steps of `expected`, as many as `found` has, and what both end with, within float tolerance."""
    metrics = expected["metrics"][-len(found["metrics"]) :]
    for step, (mine, theirs) in enumerate(zip(found["metrics"], metrics, strict=True)):
        assert mine.keys() == theirs.keys(), step
        for name in theirs.keys() - set(RATES):
            assert mine[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-5), (step, name)
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-5), step
    assert found["state"].keys() == expected["state"].keys()
    for name, value in expected["state"].items():
        torch.testing.assert_close(found["state"][name], value, rtol=1e-4, atol=2e-5, msg=name)


def assert_about_same(found: dict, expected: dict) -> None:
    """Losses and dtypes, as near as bfloat16 lets them be."""
    assert len(found["metrics"]) == len(expected["metrics"]) == STEPS
    for mine, theirs in zip(found["metrics"], expected["metrics"], strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-2)
    assert {name: value.dtype for name, value in found["state"].items()} == {
        name: value.dtype for name, value in expected["state"].items()
    }
