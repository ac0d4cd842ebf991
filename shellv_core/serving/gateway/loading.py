"""Brings a model up, in whichever way its entry says, and takes it down again."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from shellv_core.errors import ServingError
from shellv_core.logs import get_logger
from shellv_core.serving.engine import (
    Engine,
    GenerationRequest,
    ImagePart,
    Message,
    NotReadyError,
    RequestError,
    TextPart,
)
from shellv_core.serving.gateway.config import ModelEntry
from shellv_core.serving.gateway.replica import Replica
from shellv_core.serving.gateway.replicated import ReplicatedEngine
from shellv_core.serving.gateway.workers import WorkerPool
from shellv_core.serving.hallucination import Grounding, Thresholds, read_thresholds
from shellv_core.serving.heads import fetch_heads, find_heads
from shellv_core.serving.reference import fetch_adapter, fetch_model

if TYPE_CHECKING:
    from shellv_core.serving.transformers_engine import TransformersEngine

logger = get_logger(__name__)

FIRST_LOOK_SECONDS = 5.0
#: Of a model's weights; what loading and the first requests need beside them.
HEADROOM = 1.25
BITS = {"nf4": 4.5, "int8": 8.5}
DTYPE_BITS = {"float32": 32, "bfloat16": 16, "float16": 16}


@dataclass
class Running:
    """A model that is up.

    Attributes:
        engine: answers for it.
        revision: SHA-256 that names its weights.
        stop: ends what belongs to it beside the engine, once that is drained.
        grounding, thresholds: as of `ServedModel`.
    """

    engine: Engine
    revision: str
    stop: Callable[[], None] = field(default=lambda: None)
    grounding: Grounding | None = None
    thresholds: Thresholds | None = None


def load(entry: ModelEntry, reference: str, generation: int) -> Running:
    """Bring up what `entry` says, warm.

    Args:
        reference: what to load, which always names the same model.
        generation: a number that no other running model of this entry has.

    Raises:
        ShellVError: if that fails; nothing is left running.
    """
    if entry.engine == "embedded":
        return _load_embedded(entry, reference)
    if entry.engine == "http":
        engine = ReplicatedEngine(_Servers(entry))
        engine.await_look(FIRST_LOOK_SECONDS)
        model = engine.model
        if model is None:
            asyncio.run(engine.drain(0))
            raise NotReadyError(f"no server of {entry.id!r} answers: {engine.health().reason}")
        return Running(engine, model.revision)
    pool = WorkerPool(entry, reference, generation)
    engine = ReplicatedEngine(pool.replicas)
    try:
        engine.await_ready(entry.start_seconds, pool.check)
    except BaseException:
        asyncio.run(engine.drain(0))
        pool.stop()
        raise
    return Running(engine, engine.model.revision if engine.model else "", pool.stop)


def check_room(entry: ModelEntry, reference: str) -> None:
    """Check that a second copy of `entry` fits into the memory that is free.

    Raises:
        ServingError: saying what is needed, what is there, and what to do.
    """
    import torch

    from shellv_core.serving.inference.memory import GIB, free_memory

    weights = sum(file.stat().st_size for file in fetch_model(reference).path.rglob("*.safetensors"))
    bits = BITS[entry.quantization] if entry.quantization else DTYPE_BITS[entry.dtype]
    needed = HEADROOM * weights * bits / _stored_bits(reference) * entry.replicas
    devices = entry.devices or (entry.device,)
    free = min(free_memory(torch.device("cuda:0" if each == "auto" else each)) for each in devices)
    if needed > free:
        raise ServingError(
            f"the new revision needs about {needed / GIB:.1f} GiB beside the old one, and {free / GIB:.1f}"
            " GiB are free; the old one goes on. Set swap: stop_first to stop it before the new one is loaded, or free"
            " memory."
        )


def warm_up(engine: Engine) -> None:
    """Let `engine` answer one question about a picture.

    Raises:
        ServingError: if it cannot.
    """
    asyncio.run(_ask_once(engine))


async def _ask_once(engine: Engine) -> None:
    from PIL import Image

    picture = ImagePart(Image.new("RGB", (64, 64), "gray"))
    request = GenerationRequest((Message("user", (picture, TextPart("What is this?"))),), max_tokens=2)
    try:
        async with contextlib.aclosing(engine.generate(request)) as events:
            async for _ in events:
                pass
    except RequestError as error:
        logger.info("the model takes no warming question: %s", error)


def _load_embedded(entry: ModelEntry, reference: str) -> Running:
    from shellv_core.serving.inference.loading import load_served
    from shellv_core.serving.transformers_engine import TransformersEngine

    files = fetch_model(reference)
    adapters = {name: fetch_adapter(uri) for name, uri in entry.adapters.items()}
    thresholds = _thresholds(entry, files.revision)
    heads = find_heads(reference) if entry.heads is None else fetch_heads(entry.heads)
    model, processor, on_model = load_served(files.path, entry.device, entry.dtype, entry.quantization, adapters)
    engine = TransformersEngine(model, processor, entry.options, on_model)
    try:
        grounding = None if heads is None else _grounding(engine, model, processor, heads)
        warm_up(engine)
    except BaseException:
        asyncio.run(engine.drain(0))
        raise
    return Running(engine, files.revision, _free, grounding, thresholds)


def _grounding(engine: TransformersEngine, model: Any, processor: Any, heads: Path) -> Grounding:
    from shellv_core.models.hacl import load_heads
    from shellv_core.serving.inference.grounding import HeadsGrounding

    logger.info("HACL heads for the hallucination view: %s", heads)
    return HeadsGrounding(engine, model, processor, load_heads(heads))


def _thresholds(entry: ModelEntry, revision: str) -> Thresholds | None:
    """The thresholds for this revision; a followed alias goes on without them when it moves."""
    if entry.thresholds is None:
        return None
    thresholds = read_thresholds(entry.thresholds)
    if thresholds.revision == revision:
        return thresholds
    problem = (
        f"{entry.thresholds} is for revision {thresholds.revision[:12]}, {entry.id} is {revision[:12]}; make it anew"
        " with: shellv calibrate"
    )
    if not entry.follows_alias:
        raise ServingError(f"{problem}.")
    logger.warning("nothing is marked as likely made up: %s", problem)
    return None


def _stored_bits(reference: str) -> float:
    from shellv_core.models.compose import stored_dtype

    return 8.0 * stored_dtype(fetch_model(reference).path).itemsize


def _free() -> None:
    """Give back what a model held that nobody refers to any more."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


class _Servers:
    """The servers of an entry with engine ``http``; where their names are to be resolved, at each call anew."""

    def __init__(self, entry: ModelEntry) -> None:
        self._entry = entry
        self._api_key = os.environ.get(entry.api_key_variable, "") if entry.api_key_variable else ""
        self._known: dict[str, Replica] = {}

    def __call__(self) -> Sequence[Replica]:
        urls = dict.fromkeys(found for url in self._entry.urls for found in self._found(url))
        self._known = {url: self._known.get(url) or self._replica(url) for url in urls}
        return list(self._known.values())

    def _found(self, url: str) -> list[str]:
        if not self._entry.discover:
            return [url]
        parts = urlsplit(url)
        try:
            answers = socket.getaddrinfo(parts.hostname, parts.port or 80, type=socket.SOCK_STREAM)
        except OSError as error:
            logger.warning("%s cannot be resolved (%s); its known servers stay", parts.hostname, error)
            return list(self._known)
        hosts = sorted({f"[{answer[4][0]}]" if ":" in str(answer[4][0]) else str(answer[4][0]) for answer in answers})
        return [parts._replace(netloc=f"{host}:{parts.port or 80}").geturl() for host in hosts]

    def _replica(self, url: str) -> Replica:
        port = self._entry.operations_port
        host = urlsplit(url).hostname or ""
        operations = f"http://{f'[{host}]' if ':' in host else host}:{port}" if port else None
        return Replica(url, self._entry.model or None, operations, self._api_key)
