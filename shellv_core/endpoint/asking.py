"""Many questions to an endpoint: side by side, rate-limited, retried within bounds, cached and paid for."""

from __future__ import annotations

import asyncio
import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Generator, Iterable, Mapping
from contextlib import closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from shellv_core.config import fingerprint
from shellv_core.endpoint.client import Completion, EndpointClient, EndpointError
from shellv_core.endpoint.config import EndpointConfig
from shellv_core.errors import ConfigError

Messages = list[dict[str, Any]]

OUT_OF_TIME = "out of time"
_RETRIED_STATUS = frozenset({408, 409, 429})
_MAX_PAUSE_SECONDS = 60.0


@dataclass(frozen=True)
class ChatRequest:
    """What is asked: chat messages, and settings that differ from the endpoint's own."""

    messages: Messages
    max_tokens: int | None = None
    seed: int | None = None


@dataclass(frozen=True)
class Reply:
    """A model's answer, or in `fault` the reason why there is none."""

    text: str = ""
    fault: str = ""


@dataclass
class Usage:
    """What was sent and what it cost: `requests` by sent, retried, cached and failed."""

    requests: Counter[str] = field(default_factory=Counter)
    input_tokens: int = 0
    output_tokens: int = 0
    cost: float = 0.0

    def to_record(self) -> dict[str, Any]:
        """A JSON-serialisable form, keys sorted."""
        return {
            "requests": dict(sorted(self.requests.items())),
            "input_tokens": self.input_tokens,
            "output_tokens": self.output_tokens,
            "cost": round(self.cost, 6),
        }


class Endpoint:
    """A chat endpoint that is asked many questions.

    A fault leaves a question without an answer, with the reason in its reply; nothing is put in its place and nothing
    is cached. Every question is replied to, within the bounds of `config`, whatever the server does.

    Raises:
        ConfigError: if no model is named, the address is none, or the key's environment variable is not set.
    """

    def __init__(self, config: EndpointConfig) -> None:
        address = urlsplit(config.base_url)
        if address.scheme not in ("http", "https") or not address.hostname:
            raise ConfigError(f"endpoint.base_url={config.base_url!r} is no address; give one like https://HOST/v1.")
        if address.password or address.username:
            raise ConfigError("the endpoint's address holds a user name; give the key in an environment variable.")
        if not config.model:
            raise ConfigError(
                f"no model is named for the endpoint {config.base_url}; set the one that it should use (endpoint.model,"
                " or judge.model of a judge)."
            )
        key = os.environ.get(config.api_key_variable, "") if config.api_key_variable else ""
        if config.api_key_variable and not key:
            raise ConfigError(
                f"the environment variable {config.api_key_variable} is not set; it must hold the endpoint's key (set"
                " endpoint.api_key_variable to the variable's name, or to nothing where the server asks for no key)."
            )
        self._config = config
        self._client = EndpointClient(config.base_url, key, config.timeout_seconds)
        self._interval = 60.0 / config.requests_per_minute
        self._next_request = 0.0
        self._deadline: float | None = None

    def check_access(self) -> None:
        """Return if the server is there and takes the key; a server without a list of models is trusted to be.

        Raises:
            EndpointError: if nothing answers there, or the key is refused.
        """
        for attempt in range(self._config.max_retries + 1):
            try:
                asyncio.run(self._client.model())
            except EndpointError as error:
                if error.status in (401, 403) or (not error.status and attempt == self._config.max_retries):
                    raise
                if not error.status:
                    time.sleep(min(self._config.retry_seconds, _MAX_PAUSE_SECONDS))
                    continue
            return

    def ask(self, requests: Iterable[ChatRequest], usage: Usage) -> Generator[tuple[int, Reply], None, None]:
        """Yield (index, reply) for each request once, as the replies arrive.

        `requests` is read as far as they are sent. Closing the iterator cancels what is under way.
        """
        if self._deadline is None and self._config.total_seconds is not None:
            self._deadline = time.monotonic() + self._config.total_seconds
        numbered = enumerate(requests)
        pending: dict[asyncio.Task[Reply], int] = {}
        with asyncio.Runner() as runner:
            runner.run(self._client.open())
            try:
                while True:
                    for index, request in islice(numbered, self._config.concurrency - len(pending)):
                        pending[runner.get_loop().create_task(self._reply(request, usage))] = index
                    if not pending:
                        return
                    done, _ = runner.run(_first_done(pending))
                    for task in done:
                        yield pending.pop(task), task.result()
            finally:
                for task in pending:
                    task.cancel()
                runner.run(self._client.close())

    def ask_all(self, requests: Iterable[ChatRequest], usage: Usage) -> list[Reply]:
        """One reply for each request, in order."""
        with closing(self.ask(requests, usage)) as replies:
            return [reply for _, reply in sorted(replies, key=lambda each: each[0])]

    async def _reply(self, request: ChatRequest, usage: Usage) -> Reply:
        body = self._body(request)
        cached = self._cache_file(request, body)
        if cached is not None and cached.is_file():
            usage.requests["cached"] += 1
            return Reply(json.loads(cached.read_text(encoding="utf-8"))["text"])
        reply = await self._try(request.messages, body, usage)
        if reply.fault:
            usage.requests["failed"] += 1
        elif cached is not None:
            cached.parent.mkdir(parents=True, exist_ok=True)
            partial = cached.with_suffix(f".{os.getpid()}.{threading.get_ident()}.{id(request)}")
            partial.write_text(json.dumps({"text": reply.text}), encoding="utf-8")
            partial.replace(cached)
        return reply

    async def _try(self, messages: Messages, body: Mapping[str, Any], usage: Usage) -> Reply:
        config = self._config
        if not await self._take_turn(self._deadline):
            return Reply(fault=OUT_OF_TIME)
        end = time.monotonic() + config.question_seconds
        end = end if self._deadline is None else min(end, self._deadline)
        fault, pause, told = OUT_OF_TIME, config.retry_seconds, None
        for attempt in range(config.max_retries + 1):
            if attempt:
                wait = min(pause, _MAX_PAUSE_SECONDS) * random.uniform(0.75, 1.25) if told is None else told
                pause *= 2
                if time.monotonic() + wait >= end:
                    break
                await asyncio.sleep(wait)
                if not await self._take_turn(end):
                    break
                usage.requests["retried"] += 1
            usage.requests["sent"] += 1
            try:
                async with asyncio.timeout(min(config.timeout_seconds, max(0.0, end - time.monotonic()))):
                    completion = await self._client.complete(messages, **body)
            except TimeoutError:
                fault, told = "timeout", None
            except EndpointError as error:
                fault, told = error.reason, error.retry_after_seconds
                if 400 <= error.status < 500 and error.status not in _RETRIED_STATUS:
                    break
            else:
                self._pay(completion, usage)
                return Reply(completion.text)
        return Reply(fault=fault)

    async def _take_turn(self, end: float | None) -> bool:
        """Wait until the rate allows one more request; False where that is only after `end`."""
        now = time.monotonic()
        at = max(self._next_request, now)
        if end is not None and at >= end:
            return False
        self._next_request = at + self._interval
        await asyncio.sleep(at - now)
        return True

    def _body(self, request: ChatRequest) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self._config.model,
            "max_tokens": request.max_tokens or self._config.max_tokens,
            "temperature": self._config.temperature,
            "seed": request.seed,
            **self._config.body,
        }
        return {key: value for key, value in body.items() if value is not None}

    def _cache_file(self, request: ChatRequest, body: Mapping[str, Any]) -> Path | None:
        if not self._config.cache_path:
            return None
        name = fingerprint(self._config.base_url, body, request.messages)
        return Path(self._config.cache_path) / name[:2] / f"{name}.json"

    def _pay(self, completion: Completion, usage: Usage) -> None:
        usage.input_tokens += completion.input_tokens
        usage.output_tokens += completion.output_tokens
        usage.cost += (
            completion.input_tokens * self._config.input_price + completion.output_tokens * self._config.output_price
        ) / 1e6


async def _first_done(
    tasks: Iterable[asyncio.Task[Reply]],
) -> tuple[set[asyncio.Task[Reply]], set[asyncio.Task[Reply]]]:
    return await asyncio.wait(list(tasks), return_when=asyncio.FIRST_COMPLETED)
