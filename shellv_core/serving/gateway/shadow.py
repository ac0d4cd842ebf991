"""Shadow traffic: a model sees real requests, and nobody sees its answers."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import replace

from shellv_core.errors import ServingError
from shellv_core.logs import get_logger
from shellv_core.serving.engine import Engine, GenerationRequest, TokenEvent
from shellv_core.serving.gateway.line import Held

logger = get_logger(__name__)

MAX_SHADOWS = 8
"""Copies that are answered at once; one more is not sent."""
_tasks: set[asyncio.Task[None]] = set()


class ShadowedEngine(Held):
    """An engine whose requests go to another one as well.

    Args:
        engine: answers.
        shadow: gets a copy; what it answers, or whether, has no effect.
        adapter: the shadow's adapter.
    """

    def __init__(self, engine: Engine, shadow: Engine, adapter: str | None) -> None:
        super().__init__(engine)
        self._shadow, self._adapter = shadow, adapter

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """See `Engine.generate`."""
        if len(_tasks) < MAX_SHADOWS:
            copy = asyncio.create_task(_answer(self._shadow, replace(request, adapter=self._adapter)))
            _tasks.add(copy)
            copy.add_done_callback(_tasks.discard)
        async with aclosing(super().generate(request)) as events:
            async for event in events:
                yield event


async def _answer(engine: Engine, request: GenerationRequest) -> None:
    try:
        async with aclosing(engine.generate(request)) as events:
            async for _ in events:
                pass
    except ServingError as error:
        logger.info("a shadow failed: %s", error)
