"""One model entry over time: what it should be is looked up again and again, and taken up without cutting an answer."""

from __future__ import annotations

import asyncio
import threading
import time
import weakref
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, replace

from shellv_core.config import fingerprint
from shellv_core.errors import ShellVError, TrackingError
from shellv_core.logs import get_logger
from shellv_core.serving.engine import (
    AdapterInfo,
    Engine,
    EngineHealth,
    EngineStats,
    GenerationRequest,
    Message,
    NotReadyError,
    TokenEvent,
)
from shellv_core.serving.gateway.config import ModelEntry
from shellv_core.serving.gateway.loading import Running, check_room, load
from shellv_core.serving.gateway.replicated import ReplicatedEngine
from shellv_core.serving.models import ServedModel
from shellv_core.serving.reference import NotRegisteredError, find_registered

logger = get_logger(__name__)

RELEASE_SECONDS = 330.0
"""How long an old revision waits for those who use it: longer than any answer may take."""
DRAIN_SECONDS = 5.0
FIRST_RETRY_SECONDS, MAX_RETRY_SECONDS = 2.0, 300.0
WAITS = (NotRegisteredError, TrackingError, NotReadyError)
"""Faults that end by themselves: when somebody promotes a model, or the registry or a server is back."""


@dataclass(frozen=True)
class Target:
    """What should run: an entry, and a reference that always names the same model."""

    entry: ModelEntry
    reference: str


class Held:
    """An engine as requests hold it: when nobody refers to this object any more, nobody uses that revision."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine

    @property
    def context_length(self) -> int:
        """See `Engine.context_length`."""
        return self._engine.context_length

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """See `Engine.generate`."""
        events = self._engine.generate(request)
        try:
            async for event in events:
                yield event
        finally:
            await events.aclose()

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        """See `Engine.count_tokens`."""
        return await self._engine.count_tokens(messages)

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """See `Engine.adapters`."""
        return self._engine.adapters()

    def health(self) -> EngineHealth:
        """See `Engine.health`."""
        return self._engine.health()

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        return self._engine.stats()

    async def drain(self, deadline_seconds: float) -> None:
        """See `Engine.drain`."""
        await self._engine.drain(deadline_seconds)


@dataclass(frozen=True)
class _Current:
    """What runs now; `models` are the entry's and its adapters'."""

    target: Target
    running: Running
    models: tuple[ServedModel, ...]


class Line:
    """Keeps what runs at what `entry` says, from a thread of its own.

    Args:
        poll_seconds: between two looks at what an alias names.
    """

    def __init__(self, entry: ModelEntry, poll_seconds: float) -> None:
        self.error: Exception | None = None
        self._entry, self._poll_seconds = entry, poll_seconds
        self._current: _Current | None = None
        self._leaving: list[Running] = []
        self._generation = 0
        self._draining = False
        self._said = ""
        self._failed: tuple[Target, float, float] | None = None  # what, not before when, pause
        self._closing, self._wake, self._looked = threading.Event(), threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._live, name=f"model {entry.id}", daemon=True)
        self._thread.start()

    @property
    def entry(self) -> ModelEntry:
        """As it should be now."""
        return self._entry

    @property
    def models(self) -> tuple[ServedModel, ...]:
        """The entry's model and those of its adapters; empty while nothing is loaded."""
        current = self._current
        return current.models if current else ()

    @property
    def problem(self) -> str:
        """Why what should run does not."""
        return str(self.error) if self.error else "" if self._current else "it is being loaded"

    def await_look(self) -> None:
        """Return when the first attempt to load is over, whatever came of it."""
        self._looked.wait()

    @property
    def has_looked(self) -> bool:
        """Whether the first attempt to load is over."""
        return self._looked.is_set()

    def change(self, entry: ModelEntry) -> None:
        """Take up another entry of the same id; what runs answers until that is done."""
        self._entry, self._failed = entry, None
        self._wake.set()

    def close(self) -> None:
        """Serve nothing any more; what runs ends when its requests have. Does not wait."""
        self._closing.set()
        self._wake.set()

    async def drain(self, deadline_seconds: float) -> None:
        """Take no more work, let what runs finish, fail the rest after the deadline, and end everything."""
        self._draining = True
        self.close()
        current = self._current
        ending = [*self._leaving, *([current.running] if current else [])]
        await asyncio.gather(*(each.engine.drain(deadline_seconds) for each in ending))
        await asyncio.gather(*(asyncio.to_thread(each.stop) for each in ending))

    def _live(self) -> None:
        while not self._closing.is_set():
            try:
                self._look()
                self.error, self._said = None, ""
            except Exception as error:  # noqa: BLE001  whatever it is, what runs goes on
                self._report(error)
            self._looked.set()
            self._wake.wait(self._poll_seconds)
            self._wake.clear()
        if self._draining:
            return  # what runs is shown, and refuses, until the end
        current, self._current = self._current, None
        if current:
            self._retire(current.running, weakref.ref(current.models[0].engine))

    def _look(self) -> None:
        """Take up what should run, if that is something else than what runs."""
        entry = self._entry
        reference = entry.model
        if entry.follows_alias:
            found = find_registered(reference)
            reference = f"models:/{found.name}/{found.version}"
        target = Target(entry, reference)
        if self._current and self._current.target == target:
            self._follow_servers(self._current)
            return
        if self._failed and self._failed[0] == target and time.monotonic() < self._failed[1]:
            raise self.error or ShellVError("loading failed")
        try:
            self._take_up(target)
        except WAITS:
            raise
        except Exception:
            pause = self._failed[2] if self._failed and self._failed[0] == target else FIRST_RETRY_SECONDS
            self._failed = (target, time.monotonic() + pause, min(2 * pause, MAX_RETRY_SECONDS))
            raise
        self._failed = None

    def _take_up(self, target: Target) -> None:
        """Load `target`, then let it answer instead of what runs."""
        if self._current and target.entry.engine != "http":
            if target.entry.swap == "stop_first":
                logger.warning("%s: the old revision stops before the new one is loaded", target.entry.id)
                running = self._current.running
                released = weakref.ref(self._current.models[0].engine)
                self._current = None
                self._end(running, released)
            else:
                check_room(target.entry, target.reference)
        self._generation += 1
        running = load(target.entry, target.reference, self._generation)
        if self._closing.is_set():
            asyncio.run(running.engine.drain(0))
            running.stop()
            return
        old = self._current
        self._current = _Current(target, running, _served(target.entry, running))
        logger.info("serving %s from %s, revision %s", target.entry.id, target.reference, running.revision[:12])
        if old is not None:
            old_running, released = old.running, weakref.ref(old.models[0].engine)
            del old
            self._retire(old_running, released)

    def _follow_servers(self, current: _Current) -> None:
        """Servers elsewhere change by themselves; say what they serve now."""
        engine = current.running.engine
        if current.target.entry.engine != "http" or not isinstance(engine, ReplicatedEngine) or engine.model is None:
            return
        model = engine.model
        shown = {each.adapter: each.revision for each in current.models}
        served: dict[str | None, str] = {each.name: each.revision for each in model.adapters}
        if shown != served | {None: model.revision}:
            running = replace(current.running, revision=model.revision)
            self._current = _Current(current.target, running, _served(current.target.entry, running))
            logger.info("%s is now revision %s at its servers", current.target.entry.id, model.revision[:12])

    def _retire(self, running: Running, held: weakref.ref[Engine]) -> None:
        threading.Thread(target=self._end, args=(running, held), name="retiring", daemon=True).start()

    def _end(self, running: Running, held: weakref.ref[Engine]) -> None:
        """End an old revision when nobody holds it any more."""
        self._leaving.append(running)
        try:
            deadline = time.monotonic() + RELEASE_SECONDS
            while held() is not None and time.monotonic() < deadline:
                time.sleep(0.02)
            asyncio.run(running.engine.drain(DRAIN_SECONDS))
            running.stop()
        finally:
            self._leaving.remove(running)
        logger.info("revision %s of %s has ended", running.revision[:12], self._entry.id)

    def _report(self, error: Exception) -> None:
        self.error = error
        text = str(error)
        if text == self._said:
            return
        self._said = text
        if isinstance(error, WAITS):
            logger.warning("%s waits: %s", self._entry.id, text)
        elif isinstance(error, ShellVError):
            logger.error("%s: %s", self._entry.id, text)
        else:
            logger.error("%s: loading failed", self._entry.id, exc_info=error)


def _served(entry: ModelEntry, running: Running) -> tuple[ServedModel, ...]:
    """The models of what runs; all share one `Held`."""
    held = Held(running.engine)
    base = ServedModel(held, entry.id, running.revision, grounding=running.grounding, thresholds=running.thresholds)
    models = [base]
    for adapter in running.engine.adapters():
        # Servers tell revisions that count the base in.
        embedded = entry.engine == "embedded"
        revision = fingerprint(running.revision, adapter.revision) if embedded else adapter.revision
        models.append(ServedModel(held, adapter.name, revision, entry.id, adapter.name))
    return tuple(models)
