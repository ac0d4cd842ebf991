from __future__ import annotations

import pytest

from shellv_core.serving.engine import EngineHealth
from shellv_core.serving.models import FixedModels, ModelNotFoundError, ServedModel


class Engine:
    """Only what a list of models asks of one."""

    context_length = 8

    def __init__(self, health):
        self._health, self.drained = health, []

    def health(self):
        return self._health

    async def drain(self, deadline_seconds):
        self.drained.append(deadline_seconds)


def models_of(*healths):
    engines = [Engine(health) for health in healths]
    served = [ServedModel(engine, f"model-{index}", str(index) * 64) for index, engine in enumerate(engines)]
    adapter = ServedModel(engines[0], "polite", "f" * 64, parent="model-0", adapter="polite")
    return FixedModels(*served, adapter), engines


def test_a_model_is_found_by_its_name_and_the_first_without_one():
    models, engines = models_of(EngineHealth(True, True), EngineHealth(True, True))
    assert models.find().name == "model-0"
    assert models.find("model-1", user="someone").engine is engines[1]
    assert (models.find("polite").adapter, models.find("polite").engine) == ("polite", engines[0])
    assert [model.name for model in models.list()] == ["model-0", "model-1", "polite"]


def test_the_nearest_name_is_told():
    models, _ = models_of(EngineHealth(True, True))
    with pytest.raises(ModelNotFoundError, match="'polit' is not served here; did you mean 'polite'") as caught:
        models.find("polit")
    assert (caught.value.param, caught.value.code) == ("model", "model_not_found")


def test_all_must_be_well():
    models, _ = models_of(EngineHealth(True, True), EngineHealth(True, False, "the queue is full"))
    assert models.health() == EngineHealth(True, False, "the queue is full")


async def _drain(models):
    await models.drain(3.0)


def test_an_engine_with_adapters_is_drained_once():
    import asyncio

    models, engines = models_of(EngineHealth(True, True), EngineHealth(True, True))
    asyncio.run(_drain(models))
    assert [engine.drained for engine in engines] == [[3.0], [3.0]]
