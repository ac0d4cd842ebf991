"""What is served under which name: the HTTP layer asks `Models`, never an engine that it was given once.

A request holds the `ServedModel` that it found until its end, so that a model can be replaced under the same name
without cutting an answer.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol

from shellv_core.config import nearest
from shellv_core.serving.engine import Engine, EngineHealth, RequestError
from shellv_core.serving.hallucination import Grounding, Thresholds


class ModelNotFoundError(RequestError):
    """No model of this name is served."""


@dataclass(frozen=True)
class ServedModel:
    """A model that clients can name.

    Attributes:
        engine: answers for it.
        name: the id that clients use.
        revision: SHA-256 (64 hex digits) that names the very weights, the adapter's included.
        parent: the id of the model that an adapter belongs to; None for a model of its own.
        adapter: what `GenerationRequest.adapter` must be for this model; None for the engine's base.
        created: when it was first served, in seconds since 1970.
        grounding: how well sentences fit pictures, for a model with HACL's heads.
        thresholds: what in an answer is marked as likely made up.
    """

    engine: Engine
    name: str
    revision: str
    parent: str | None = None
    adapter: str | None = None
    created: int = field(default_factory=lambda: int(time.time()))
    grounding: Grounding | None = None
    thresholds: Thresholds | None = None


class Models(Protocol):
    """The models that are served now; which these are may change between two calls."""

    def find(self, name: str | None = None, user: str | None = None) -> ServedModel:
        """The model to ask for one request.

        Args:
            name: a served model's id; None for the one that is asked by default.
            user: the client's word for who asks; requests of one user stay on one side of a split.

        Raises:
            ModelNotFoundError: naming the nearest id, if none is called `name`.
        """
        ...

    def list(self) -> Sequence[ServedModel]:
        """All of them, each adapter behind its parent."""
        ...

    def health(self) -> EngineHealth:
        """Whether the process should go on living, and whether requests should be sent to it now."""
        ...

    async def drain(self, deadline_seconds: float) -> None:
        """Take no more work, let what runs finish, and after the deadline fail the rest."""
        ...


class FixedModels:
    """Models that stay as they are, most often one and its adapters.

    Args:
        models: at least one, with ids of their own; the first is asked by default.
    """

    def __init__(self, *models: ServedModel) -> None:
        self._models = {model.name: model for model in models}
        self._default = models[0]
        # Adapters share their parent's engine.
        self._engines = list({id(model.engine): model.engine for model in models}.values())

    def find(self, name: str | None = None, user: str | None = None) -> ServedModel:
        """See `Models.find`."""
        if name is None:
            return self._default
        if name not in self._models:
            raise ModelNotFoundError(
                f"the model {name!r} is not served here; {nearest(name, self._models)}", "model", "model_not_found"
            )
        return self._models[name]

    def list(self) -> Sequence[ServedModel]:
        """See `Models.list`."""
        return list(self._models.values())

    def health(self) -> EngineHealth:
        """Alive and ready as long as every engine is."""
        healths = [engine.health() for engine in self._engines]
        reasons = [health.reason for health in healths if health.reason]
        return EngineHealth(
            all(health.alive for health in healths), all(health.ready for health in healths), "; ".join(reasons)
        )

    async def drain(self, deadline_seconds: float) -> None:
        """See `Models.drain`."""
        await asyncio.gather(*(engine.drain(deadline_seconds) for engine in self._engines))
