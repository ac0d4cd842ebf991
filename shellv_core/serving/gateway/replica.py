"""One server of a model: what it says of its load, and whether it has failed too often lately."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Any

from shellv_core.endpoint.client import EndpointClient, EndpointError
from shellv_core.serving.engine import EngineStats
from shellv_core.serving.gateway.remote import RemoteEngine, RemoteModel, describe
from shellv_core.serving.gateway.wire import OWNER

MAX_FAILURES = 3
OPEN_SECONDS = 10.0


@dataclass
class Breaker:
    """Keeps requests from a server that failed `MAX_FAILURES` times in a row, and then lets one try at a time."""

    failures: int = 0
    open_until: float = 0.0

    def closed(self) -> bool:
        """Whether a request may go there."""
        return self.failures < MAX_FAILURES or time.monotonic() >= self.open_until

    def begin(self) -> None:
        """A request goes there; while it is a trial, no other does."""
        if self.failures >= MAX_FAILURES:
            self.open_until = time.monotonic() + OPEN_SECONDS

    def succeed(self) -> None:
        """It was answered."""
        self.failures = 0

    def fail(self) -> None:
        """It was not, by the server's fault."""
        self.failures += 1
        self.open_until = time.monotonic() + OPEN_SECONDS


@dataclass(eq=False)
class Replica:
    """A server that answers for a model.

    Attributes:
        url: its address, as `EndpointClient` takes it.
        name: the model's id there; None for the only one.
        operations_url: where it tells its load; None where it does not.
        api_key: that it asks for; empty for none.
        engine: None until it has been reached.
        ready: whether it takes requests, by its own last word; `problem` says why not.
        outstanding: requests that were sent there from here and are not answered.
    """

    url: str
    name: str | None = None
    operations_url: str | None = None
    api_key: str = field(default="", repr=False)
    engine: RemoteEngine | None = None
    ready: bool = False
    problem: str = "it has not been reached yet"
    outstanding: int = 0
    breaker: Breaker = field(default_factory=Breaker)
    _told: EngineStats = field(default_factory=lambda: EngineStats(0, 0))
    _outstanding_then: int = 0

    def stats(self) -> EngineStats:
        """Its requests and places, by its own last word and what was sent since."""
        running = max(self._told.running + self._told.waiting + self.outstanding - self._outstanding_then, 0)
        waiting = max(running - self._told.slots, 0)
        return EngineStats(running - waiting, waiting, self._told.slots)

    @property
    def load(self) -> float:
        """Requests per place."""
        stats = self.stats()
        return (stats.running + stats.waiting) / max(stats.slots, 1)

    async def poll(self, client: EndpointClient) -> None:
        """Ask which model is there, whether it takes requests, and how busy it is.

        Args:
            client: for `url`.
        """
        try:
            model = await describe(client, self.name)
            if self.engine is None or self.engine.model != model:
                self.engine = RemoteEngine(self.url, model, self.api_key)
            await self._ask(client, model)
        except EndpointError as error:
            self.ready, self.problem = False, str(error)

    async def _ask(self, client: EndpointClient, model: RemoteModel) -> None:
        outstanding = self.outstanding
        if self.operations_url is not None:
            told = await client.ask("GET", f"{self.operations_url}/internal/load")
            self.ready, self._told = bool(told.get("ready")), _stats_of(told, model.name)
        else:
            if model.owner == OWNER:
                await client.check_readiness()
            self.ready, self._told = True, EngineStats(outstanding, 0)
        self._outstanding_then = outstanding
        self.problem = "" if self.ready else "it takes no requests now"


def _stats_of(told: dict[str, Any], name: str) -> EngineStats:
    models = told.get("models")
    found = [each for each in models if each.get("id") == name] if isinstance(models, list) else []
    if not found:
        return EngineStats(0, 0)
    return EngineStats(int(found[0]["running"]), int(found[0]["waiting"]), int(found[0]["slots"]))
