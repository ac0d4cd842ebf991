"""Asking: one answer with its figures, or several side by side. Leaving a generator here frees the model's places."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from shellv_core.endpoint.client import EndpointClient, EndpointError
from shellv_core.errors import ServingError
from shellv_core.serving.page.turns import History

UPDATE_SECONDS = 0.1
"""A browser that redraws a conversation for every token of a quick model is too busy to take a click on Stop."""
BUSY_TRIES = 5
"""How often a question is asked that a busy server sends away."""
MAX_WAIT_SECONDS = 15.0
LEAST_SECONDS = 0.02
"""Of streaming, for a pace to mean anything."""


@dataclass(frozen=True)
class Asked:
    """One question to one model: `messages` as the API takes them, and `options` (the model's id among them)."""

    messages: History
    options: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Answer:
    """What has come so far.

    Attributes:
        text: the answer.
        note: why there is nothing yet, or no more.
        first_seconds: from the question to the first word; 0 before it.
        rate: tokens per second after the first; 0 before the end, and for an answer that came at once.
        tokens, prompt_tokens: 0 before the end.
        hallucination: what of the text may be made up, where that was asked for; see `highlighted`.
        failed: whether the server refused or failed.
        done: whether this is the last of it.
    """

    text: str = ""
    note: str = ""
    first_seconds: float = 0.0
    rate: float = 0.0
    tokens: int = 0
    prompt_tokens: int = 0
    hallucination: dict[str, Any] | None = None
    failed: bool = False
    done: bool = False


async def ask(client: EndpointClient, asked: Asked) -> AsyncGenerator[Answer, None]:
    """The answer a few times a second, and at last with `done`; faults come as an answer with a note.

    A server that is busy is asked again when it says so, at most `BUSY_TRIES` times.
    """
    for left in reversed(range(BUSY_TRIES)):
        try:
            async with aclosing(_answer(client, asked)) as answers:
                async for answer in answers:
                    yield answer
            return
        except EndpointError as error:
            if error.status not in (429, 503) or not left:
                yield Answer(note=_sentence(error), failed=True, done=True)
                return
            note, wait = _sentence(error), min(error.retry_after_seconds or 1.0, MAX_WAIT_SECONDS)
        except ServingError as error:
            yield Answer(note=_sentence(error), failed=True, done=True)
            return
        for seconds in range(math.ceil(wait), 0, -1):
            yield Answer(note=f"{note} ⏳ {seconds} s")
            await asyncio.sleep(min(1.0, wait))


async def _answer(client: EndpointClient, asked: Asked) -> AsyncGenerator[Answer, None]:
    started, shown = time.monotonic(), 0.0
    answer = Answer()
    try:
        async with aclosing(client.stream(asked.messages, **asked.options)) as pieces:
            async for piece in pieces:
                now = time.monotonic()
                if piece.text and not answer.text:
                    answer = replace(answer, first_seconds=now - started)
                answer = replace(answer, text=answer.text + piece.text)
                if piece.extensions:
                    answer = replace(answer, hallucination=piece.extensions.get("hallucination"))
                if piece.usage:
                    tokens = piece.usage["completion_tokens"]
                    seconds = now - started - answer.first_seconds
                    rate = (tokens - 1) / seconds if seconds >= LEAST_SECONDS else 0.0
                    answer = replace(answer, tokens=tokens, prompt_tokens=piece.usage["prompt_tokens"], rate=rate)
                if now - shown >= UPDATE_SECONDS:
                    shown = now
                    yield answer
    except EndpointError as error:
        if not answer.text:
            raise
        yield replace(answer, note=_sentence(error), failed=True, done=True)
        return
    yield replace(answer, done=True)


async def ask_all(client: EndpointClient, asked: Mapping[int, Asked]) -> AsyncGenerator[tuple[int, Answer], None]:
    """All answers at once, each with its key, as they come."""
    merged: asyncio.Queue[tuple[int, Answer] | Exception] = asyncio.Queue()

    async def pump(key: int) -> None:
        try:
            async with aclosing(ask(client, asked[key])) as answers:
                async for answer in answers:
                    merged.put_nowait((key, answer))
        except Exception as error:  # noqa: BLE001  raised where the answers are read
            merged.put_nowait(error)

    pumps = [asyncio.ensure_future(pump(key)) for key in asked]
    left = len(pumps)
    try:
        while left:
            step = await merged.get()
            if isinstance(step, Exception):
                raise step
            left -= step[1].done
            yield step
    finally:
        for each in pumps:
            each.cancel()
        await asyncio.gather(*pumps, return_exceptions=True)


def _sentence(error: ServingError) -> str:
    text = str(error).removeprefix("the endpoint says: ")
    return text[:1].upper() + text[1:]
