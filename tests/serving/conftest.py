from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.serving.tiny_model import build_model, build_processor

os.environ.setdefault("OMP_NUM_THREADS", "1")


@dataclass(frozen=True)
class Endpoint:
    """A running server, and the engine behind it."""

    url: str
    engine: Any


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def processor() -> Any:
    return build_processor()


@pytest.fixture(scope="session")
def model(processor: Any) -> Any:
    return build_model(processor)


@pytest.fixture(scope="session")
def model_path(tmp_path_factory: pytest.TempPathFactory, processor: Any) -> Path:
    """A model directory as plain transformers saves it; its context is long, so that a slow answer can be had."""
    path = tmp_path_factory.mktemp("model")
    build_model(processor, context_length=4096).save_pretrained(path)
    processor.save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def endpoint(model_path: Path) -> Iterator[Endpoint]:
    """The API over the tiny model, with room for two requests that wait; answers of 2000 tokens take seconds."""
    from shellv_core.models.compose import load_model
    from shellv_core.serving.api import ApiConfig, create_app
    from shellv_core.serving.models import FixedModels, ServedModel
    from shellv_core.serving.server import Server, bind, running_in_thread
    from shellv_core.serving.transformers_engine import EngineConfig, TransformersEngine

    engine = TransformersEngine(*load_model(model_path), EngineConfig(slots=1, max_waiting=2))
    models = FixedModels(ServedModel(engine, "tiny", "0" * 64))
    app = create_app(models, ApiConfig(max_body_bytes=4 << 20, body_timeout_seconds=2))
    with bind("127.0.0.1", 0) as listener, running_in_thread(Server(app, models), listener) as url:
        yield Endpoint(url, engine)
