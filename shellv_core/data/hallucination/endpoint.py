"""Answers by any server of the OpenAI chat protocol: concurrent, rate-limited, retried, cached and paid for.

`openai` is imported inside functions.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from shellv_core.config import fingerprint
from shellv_core.data.hallucination.captions import RewriteCounts
from shellv_core.data.hallucination.config import EndpointConfig
from shellv_core.data.hallucination.language_model import Answer, chat_messages
from shellv_core.errors import ConfigError
from shellv_core.progress import Progress

_RETRIED_STATUS = frozenset({408, 409, 429})
_MAX_PAUSE_SECONDS = 60.0


class Endpoint:
    """A chat endpoint as an answerer.

    A fault leaves the caption without an answer and is counted under its reason; nothing is put in its place.

    Raises:
        ConfigError: if no model is named or the key's environment variable is not set.
    """

    def __init__(self, config: EndpointConfig) -> None:
        from openai import OpenAI

        if not config.model:
            raise ConfigError("endpoint.model is empty; name the model that the endpoint should use.")
        key = os.environ.get(config.api_key_variable)
        if not key:
            raise ConfigError(
                f"the environment variable {config.api_key_variable} is not set; it must hold the endpoint's key (any "
                f"text where the server asks for none)."
            )
        self._config = config
        self._client = OpenAI(base_url=config.base_url, api_key=key, max_retries=0, timeout=config.timeout_seconds)
        self._pace = _Pace(config.requests_per_minute)
        self._lock = threading.Lock()

    def answer(self, prompts: Sequence[str], counts: RewriteCounts) -> list[Answer]:
        """One answer for each prompt, in order."""
        with (
            Progress(len(prompts), "endpoint", "captions") as progress,
            ThreadPoolExecutor(self._config.concurrency) as pool,
        ):
            answers = []
            for answer in pool.map(lambda prompt: self._answer_one(prompt, counts), prompts):
                answers.append(answer)
                progress.update()
        return answers

    def _answer_one(self, prompt: str, counts: RewriteCounts) -> Answer:
        messages = chat_messages(prompt)
        cached = self._cache_file(messages)
        if cached is not None and cached.is_file():
            self._count(counts, "cached")
            return Answer(json.loads(cached.read_text(encoding="utf-8"))["text"])
        answer = self._ask(messages, counts)
        if cached is not None and not answer.fault:
            cached.parent.mkdir(parents=True, exist_ok=True)
            partial = cached.with_suffix(f".{os.getpid()}.{threading.get_ident()}")
            partial.write_text(json.dumps({"text": answer.text}), encoding="utf-8")
            partial.replace(cached)
        return answer

    def _ask(self, messages: list[dict[str, Any]], counts: RewriteCounts) -> Answer:
        import openai

        pause = self._config.retry_seconds
        for attempt in range(self._config.max_retries + 1):
            if attempt:
                self._count(counts, "retried")
                time.sleep(min(pause, _MAX_PAUSE_SECONDS))
                pause *= 2
            self._pace.wait()
            self._count(counts, "sent")
            try:
                response = self._client.chat.completions.create(
                    model=self._config.model,
                    messages=messages,  # type: ignore[arg-type]
                    max_tokens=self._config.max_tokens,
                    temperature=self._config.temperature,
                )
            except openai.APIStatusError as error:
                fault = f"HTTP {error.status_code}"
                if error.status_code not in _RETRIED_STATUS and error.status_code < 500:
                    break
                told = error.response.headers.get("retry-after", "")
                if told.replace(".", "", 1).isdigit():
                    pause = float(told)
                continue
            except openai.APIConnectionError:
                fault = "no connection"
                continue
            except (openai.APIError, ValueError):
                fault = "unreadable answer"
                continue
            return self._read(response, counts)
        self._count(counts, "failed")
        return Answer(fault=fault)

    def _read(self, response: Any, counts: RewriteCounts) -> Answer:
        choices = getattr(response, "choices", None)
        text = choices[0].message.content if choices else None
        usage = getattr(response, "usage", None)
        if usage is not None:
            with self._lock:
                counts.input_tokens += usage.prompt_tokens
                counts.output_tokens += usage.completion_tokens
                counts.cost += (
                    usage.prompt_tokens * self._config.input_price + usage.completion_tokens * self._config.output_price
                ) / 1e6
        if not text:
            self._count(counts, "failed")
            return Answer(fault="unreadable answer")
        return Answer(text)

    def _cache_file(self, messages: list[dict[str, Any]]) -> Path | None:
        if not self._config.cache_path:
            return None
        name = fingerprint(
            self._config.base_url, self._config.model, self._config.temperature, self._config.max_tokens, messages
        )
        return Path(self._config.cache_path) / name[:2] / f"{name}.json"

    def _count(self, counts: RewriteCounts, name: str) -> None:
        with self._lock:
            counts.requests[name] += 1


class _Pace:
    """Lets one request pass per interval, whatever the number of threads."""

    def __init__(self, per_minute: float) -> None:
        self._interval = 60.0 / per_minute
        self._next = 0.0
        self._lock = threading.Lock()

    def wait(self) -> None:
        with self._lock:
            now = time.monotonic()
            at = max(self._next, now)
            self._next = at + self._interval
        time.sleep(max(0.0, at - now))
