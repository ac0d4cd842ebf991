"""An engine whose tokens wait at a gate, so that a test can look at a request that is under way."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time


class GatedEngine:
    """Passes everything on to `engine`; while the gate is shut, answers stand after `tokens` tokens.

    `closed` counts the generators that have ended, in whatever way.
    """

    def __init__(self, engine):
        self._engine = engine
        self._open = threading.Event()
        self._open.set()
        self.tokens = 0
        self.started = self.closed = 0

    def __getattr__(self, name):
        return getattr(self._engine, name)

    @contextlib.contextmanager
    def shut(self, tokens=0):
        """Hold answers back while the context is open."""
        self.tokens = tokens
        self._open.clear()
        try:
            yield
        finally:
            self._open.set()

    async def generate(self, request):
        self.started += 1
        try:
            async with contextlib.aclosing(self._engine.generate(request)) as events:
                async for event in events:
                    while event.completion_tokens > self.tokens and not self._open.is_set():
                        await asyncio.sleep(0.005)
                    yield event
        finally:
            self.closed += 1


def wait_for(condition, seconds=30.0):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.005)
