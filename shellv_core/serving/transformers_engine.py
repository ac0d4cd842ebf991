"""The in-process engine: requests are prepared and queued here, and one thread that owns the model runs them."""

from __future__ import annotations

import asyncio
import copy
import math
import queue
import sys
import threading
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Literal, TypeVar

from pydantic import Field

from shellv_core.config import Config
from shellv_core.errors import ShellVError
from shellv_core.logs import get_logger
from shellv_core.serving.engine import (
    AdapterInfo,
    EngineHealth,
    EngineStats,
    EngineStoppedError,
    GenerationError,
    GenerationRequest,
    Message,
    QueueFullError,
    QueueTimeoutError,
    TokenEvent,
)
from shellv_core.serving.inference.adapters import AdapterSet
from shellv_core.serving.inference.admission import allowed_tokens, check_request, context_length_of, end_ids_of
from shellv_core.serving.inference.answer import Task, Vocabulary
from shellv_core.serving.inference.job import Counters, Delivery, Errand, Job, Runner, post
from shellv_core.serving.prompt import PromptEncoder
from shellv_core.templates import template_of

logger = get_logger(__name__)
T = TypeVar("T")

POLL_SECONDS = 0.02
MAX_RETRY_AFTER_SECONDS = 60
WAITING_PER_SLOT = 4
MAX_RESTARTS = 1
#: As many requests in a row without finite logits mean that the model, and not a request, is at fault.
MAX_NONFINITE_IN_A_ROW = 3
STOPPING = "the server is shutting down; send the request again in a moment."


class EngineConfig(Config):
    """How an engine runs, and its limits."""

    batching: Literal["slots", "serial"] = "slots"
    """Many requests side by side, or one after the other."""
    slots: int = Field(default=16, ge=1)
    """Requests that run at once."""
    prefill_tokens: int = Field(default=512, ge=1)
    """Tokens of prompts that one step reads at most, while the others wait for their next token."""
    context_length: int | None = Field(default=None, ge=1)
    """Tokens of prompt and answer together; None for as many as the model takes."""
    kv_cache_gib: float | None = Field(default=None, gt=0)
    """Memory for keys and values; None for a share of what is free once the model is loaded."""
    image_cache_mib: int = Field(default=512, ge=0)
    """Memory for the features of pictures that may come again."""
    max_waiting: int | None = Field(default=None, ge=0)
    """Requests that may wait beside those that run, one more is refused; None for four times those that run."""
    max_wait_seconds: float = Field(default=30.0, gt=0)
    """A request that waits longer for its turn is refused."""
    default_max_tokens: int = Field(default=512, ge=1)
    """Length of an answer where the request names none, in tokens; less where the context ends earlier."""
    max_step_seconds: float = Field(default=120.0, gt=0)
    """A single step of the model that takes longer makes the engine count as dead."""


class TransformersEngine:
    """Answers with a transformers image-text-to-text model.

    Args:
        model: for example a `LlavaForConditionalGeneration`, in evaluation mode on its device.
        processor: its processor, with chat template.
        config: limits.
        adapters: those on the model that requests can name.

    Raises:
        ServingError: if the model cannot be run in slots, or its memory holds not one request.
    """

    def __init__(
        self, model: Any, processor: Any, config: EngineConfig | None = None, adapters: AdapterSet | None = None
    ) -> None:
        self.config = config or EngineConfig()
        self._model, self._adapters = model, adapters or AdapterSet(model)
        self._encoder = PromptEncoder(processor)
        # One thread, so that requests keep their order.
        self._preparation = ThreadPoolExecutor(1, "prompts")
        tokenizer = copy.deepcopy(processor.tokenizer)
        self.context_length = min(context_length_of(model, tokenizer), self.config.context_length or sys.maxsize)
        self._vocabulary = Vocabulary(
            tokenizer,
            model.config.get_text_config().vocab_size,
            end_ids_of(model, tokenizer),
            template_of(processor).stop_strings,
        )
        self._counters = Counters()
        self._kv_capacity = 0
        if self.config.batching == "slots":
            from shellv_core.serving.inference.checking import check_slots
            from shellv_core.serving.inference.memory import kv_capacity

            self._kv_capacity = kv_capacity(model, self.config.slots, self.context_length, self.config.kv_cache_gib)
            check_slots(model, self._adapters, self.context_length)
        self._runner = self._new_runner()

        self._lock = threading.Lock()
        self._pending: queue.SimpleQueue[Job | Errand | None] = queue.SimpleQueue()
        self._waiting: deque[Job] = deque()
        self._admitted = 0  # prepared, waiting or running
        self._finished = self._cancelled = self._rejected = self._expired = self._failed = self._restarts = 0
        self._answer_seconds = 1.0
        self._step_started: float | None = None
        self._draining = False
        self._aborted = threading.Event()
        self._thread = threading.Thread(target=self._live, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """See `Engine.generate`."""
        check_request(request, [adapter.name for adapter in self.adapters()], self._vocabulary.size)
        self._admit()
        try:
            job = await self._prepare(request)
        except BaseException as error:
            with self._lock:
                self._admitted -= 1
                self._cancelled += isinstance(error, asyncio.CancelledError)
            raise
        try:
            while True:
                event = await job.events.get()
                if isinstance(event, ShellVError):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            job.cancelled.set()

    async def count_tokens(self, messages: Sequence[Message]) -> int:
        """See `Engine.count_tokens`."""
        if self._draining:
            raise EngineStoppedError(STOPPING)
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._preparation, self._encoder.encode, tuple(messages))
        return len(prompt.token_ids)

    async def between_steps(self, work: Callable[[], T]) -> T:
        """What `work` returns, done by the engine's thread with the base model, while no step of an answer runs.

        Raises:
            EngineStoppedError: if the engine stopped before its turn came.
        """
        errand = Errand(work)
        with self._lock:
            if self._aborted.is_set() or not self._thread.is_alive():
                raise EngineStoppedError(STOPPING)
            self._pending.put(errand)
        result: T = await asyncio.wrap_future(errand.future)
        return result

    def adapters(self) -> tuple[AdapterInfo, ...]:
        """See `Engine.adapters`."""
        return self._adapters.infos

    def health(self) -> EngineHealth:
        """See `Engine.health`."""
        started = self._step_started
        if not self._thread.is_alive():
            return EngineHealth(False, False, "the engine's thread has ended")
        if started is not None and time.monotonic() - started > self.config.max_step_seconds:
            return EngineHealth(False, False, f"one step takes longer than {self.config.max_step_seconds:g} s")
        if self._draining:
            return EngineHealth(True, False, "shutting down")
        if self._counters.nonfinite_in_a_row >= MAX_NONFINITE_IN_A_ROW:
            return EngineHealth(True, False, "the model returns numbers that are not finite")
        if self._admitted >= self._room:
            return EngineHealth(True, False, "the queue is full")
        return EngineHealth(True, True)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        counters = self._counters
        with self._lock:
            running = len(self._runner.jobs)
            return EngineStats(
                running=running,
                waiting=max(self._admitted - running, 0),
                slots=self._runner.slots,
                kv_tokens=counters.kv_tokens,
                kv_capacity=counters.kv_capacity,
                finished=self._finished,
                cancelled=self._cancelled,
                rejected=self._rejected,
                expired=self._expired,
                failed=self._failed,
                prompt_tokens=counters.prompt_tokens,
                prefix_tokens=counters.prefix_tokens,
                completion_tokens=counters.completion_tokens,
                image_hits=counters.image_hits,
                image_misses=counters.image_misses,
                nonfinite=counters.nonfinite,
                out_of_memory=counters.out_of_memory,
                restarts=self._restarts,
            )

    async def drain(self, deadline_seconds: float) -> None:
        """See `Engine.drain`; afterwards the engine's thread is gone."""
        self._draining = True
        deadline = time.monotonic() + deadline_seconds
        while self._admitted and time.monotonic() < deadline:
            await asyncio.sleep(POLL_SECONDS)
        with self._lock:
            self._aborted.set()
            self._pending.put(None)
        self._preparation.shutdown(wait=False)
        while self._thread.is_alive() and time.monotonic() < deadline + self.config.max_step_seconds:
            await asyncio.sleep(POLL_SECONDS)

    @property
    def _room(self) -> int:
        waiting = self.config.max_waiting
        return self._runner.slots + (WAITING_PER_SLOT * self._runner.slots if waiting is None else waiting)

    def _new_runner(self) -> Runner:
        config = self.config
        if config.batching == "serial":
            from shellv_core.serving.inference.serial import SerialRunner

            return SerialRunner(self._model, self._vocabulary, self._counters, self._adapters)
        from shellv_core.serving.inference.images import ImageFeatures
        from shellv_core.serving.inference.scheduler import SlotRunner

        images = ImageFeatures(self._model, self._adapters, self._counters, config.image_cache_mib << 20)
        return SlotRunner(
            self._model,
            self._vocabulary,
            self._counters,
            self._adapters,
            images,
            config.slots,
            self._kv_capacity,
            config.prefill_tokens,
        )

    def _admit(self) -> None:
        if self._draining or not self._thread.is_alive():
            raise EngineStoppedError(STOPPING)
        with self._lock:
            if self._admitted >= self._room:
                self._rejected += 1
                raise QueueFullError(
                    f"{self._admitted} requests run or wait already; {self._room} are allowed.", self._retry_after()
                )
            self._admitted += 1

    def _retry_after(self) -> int:
        """Seconds until those who are here now have been answered, at the pace of the last answers."""
        seconds = math.ceil(self._answer_seconds * self._admitted / self._runner.slots)
        return min(max(seconds, 1), MAX_RETRY_AFTER_SECONDS)

    async def _prepare(self, request: GenerationRequest) -> Job:
        """Encode the prompt, and hand the request to the engine's thread."""
        loop = asyncio.get_running_loop()
        prompt = await loop.run_in_executor(self._preparation, self._encoder.encode, request.messages)
        length, default = len(prompt.token_ids), self.config.default_max_tokens
        job = Job(Task(request, prompt, allowed_tokens(request, length, self.context_length, default)), loop)
        with self._lock:  # so that no job lands behind the end mark
            if self._aborted.is_set() or not self._thread.is_alive():
                raise EngineStoppedError(STOPPING)
            self._pending.put(job)
        return job

    def _live(self) -> None:
        """The thread's life: it serves until it is told to stop, and once more if it dies of a fault of its own."""
        import torch

        with torch.inference_mode():
            while not self._aborted.is_set():
                error: ShellVError = EngineStoppedError("the server stopped before the answer's end.")
                try:
                    self._serve()
                except Exception:  # whatever it is, clients must hear of it
                    logger.exception("the engine's thread died")
                    error = GenerationError("the model's engine failed; the server's log says why.")
                    with self._lock:
                        if self._restarts == MAX_RESTARTS:
                            self._aborted.set()
                        else:
                            self._restarts += 1
                self._step_started = None
                self._fail_all(error)

    def _serve(self) -> None:
        while self._take_pending():
            if self._waiting or self._runner.jobs:
                self._step_started = time.monotonic()
                deliveries = self._runner.step(self._waiting)
                self._step_started = None
                self._deliver(deliveries)

    def _take_pending(self) -> bool:
        """Move new requests to those that wait, and drop those that wait in vain; False when it is time to end."""
        idle = not self._waiting and not self._runner.jobs
        while idle or not self._pending.empty():
            job = self._pending.get()
            if isinstance(job, Errand):
                with self._adapters.alone(None):
                    job.run()
                continue
            if job is None or self._aborted.is_set():
                if job is not None:
                    self._waiting.append(job)
                return False
            self._waiting.append(job)
            idle = False
        dropped = []
        for job in self._waiting:
            if job.cancelled.is_set():
                dropped.append(Delivery(job, None))
            elif (waited := time.monotonic() - job.submitted) > self.config.max_wait_seconds:
                message = (
                    f"the request waited {waited:.0f} s for its turn; {self.config.max_wait_seconds:g} are allowed."
                )
                dropped.append(Delivery(job, QueueTimeoutError(message, self._retry_after())))
        for delivery in dropped:
            self._waiting.remove(delivery.job)
        self._deliver(dropped)
        return not self._aborted.is_set()

    def _deliver(self, deliveries: list[Delivery]) -> None:
        # A place is free before the client hears of the end, so that its next request finds it.
        with self._lock:
            for delivery in deliveries:
                outcome = delivery.outcome
                if not delivery.last:
                    continue
                self._admitted -= 1
                self._cancelled += outcome is None
                self._expired += isinstance(outcome, QueueTimeoutError)
                self._failed += isinstance(outcome, ShellVError) and not isinstance(outcome, QueueTimeoutError)
                if isinstance(outcome, TokenEvent):
                    self._finished += 1
                    self._answer_seconds += 0.2 * (time.monotonic() - delivery.job.started - self._answer_seconds)
        post(deliveries)

    def _fail_all(self, error: ShellVError) -> None:
        left = [*self._runner.jobs, *self._waiting]
        while not self._pending.empty():
            job = self._pending.get()
            if isinstance(job, Errand):
                job.future.set_exception(EngineStoppedError(STOPPING))
            elif job is not None:
                left.append(job)
        self._waiting.clear()
        self._runner = self._new_runner()
        self._deliver([Delivery(job, None if job.cancelled.is_set() else error) for job in left])
