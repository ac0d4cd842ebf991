"""The in-process engine: one thread that owns the model and answers one request after the other.

The thread runs its own decoding loop, so that a request can be cancelled, checked and streamed after every token.
Answering several requests in one step changes `_answer` alone: admission, queue and events stay as they are.
"""

from __future__ import annotations

import asyncio
import copy
import itertools
import math
import queue
import threading
import time
from collections.abc import AsyncGenerator, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from shellv_core.config import Config
from shellv_core.errors import ShellVError
from shellv_core.logs import get_logger
from shellv_core.serving.detokenizer import Detokenizer
from shellv_core.serving.engine import (
    EngineHealth,
    EngineStats,
    EngineStoppedError,
    FinishReason,
    GenerationError,
    GenerationRequest,
    QueueFullError,
    RequestError,
    TokenEvent,
)
from shellv_core.serving.prompt import Prompt, PromptEncoder
from shellv_core.serving.sampling import sample
from shellv_core.templates import template_of

if TYPE_CHECKING:
    import torch

logger = get_logger(__name__)

POLL_SECONDS = 0.02
MAX_RETRY_AFTER_SECONDS = 60
STOPPING = "the server is shutting down; send the request again in a moment."


class EngineConfig(Config):
    """Limits of an engine."""

    max_waiting: int = 8
    """Requests that may wait for the one that runs; one more is refused."""
    default_max_tokens: int = 512
    """Length of an answer where the request names none, in tokens; less where the context ends earlier."""
    max_step_seconds: float = 120.0
    """A single step of the model that takes longer makes the engine count as dead."""


@dataclass
class _Job:
    """A request between the event loop, which reads `events`, and the engine's thread, which fills it."""

    request: GenerationRequest
    prompt: Prompt
    max_tokens: int
    loop: asyncio.AbstractEventLoop
    events: asyncio.Queue[TokenEvent | ShellVError] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)

    def emit(self, event: TokenEvent | ShellVError) -> None:
        # The loop may be closed already when the process is on its way out.
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.events.put_nowait, event)


class TransformersEngine:
    """Answers with a transformers image-text-to-text model.

    Args:
        model: for example a `LlavaForConditionalGeneration`, in evaluation mode on its device.
        processor: its processor, with chat template.
        config: limits.
    """

    def __init__(self, model: Any, processor: Any, config: EngineConfig | None = None) -> None:
        self.config = config or EngineConfig()
        self._model = model
        self._encoder = PromptEncoder(processor)
        # One thread, so that requests keep their order.
        self._preparation = ThreadPoolExecutor(1, "prompts")
        self._tokenizer = copy.deepcopy(processor.tokenizer)
        self.context_length = _context_length(model, self._tokenizer)
        self._end_ids = _end_ids(model, self._tokenizer)
        self._stop_strings = template_of(processor).stop_strings

        self._lock = threading.Lock()
        self._pending: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._admitted = 0  # prepared, waiting or running
        self._running: _Job | None = None
        self._finished = self._cancelled = self._rejected = self._failed = 0
        self._answer_seconds = 1.0
        self._step_started: float | None = None
        self._draining = False
        self._aborted = threading.Event()
        self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
        self._thread.start()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenEvent, None]:
        """See `Engine.generate`."""
        self._admit()
        submitted: _Job | None = None
        try:
            loop = asyncio.get_running_loop()
            prompt = await loop.run_in_executor(self._preparation, self._encoder.encode, request.messages)
            max_tokens = self._allowed_tokens(request, len(prompt.token_ids))
            job = _Job(request, prompt, max_tokens, loop)
            self._submit(job)
            submitted = job
            yield TokenEvent("", len(prompt.token_ids), 0)
            while True:
                event = await job.events.get()
                if isinstance(event, ShellVError):
                    raise event
                yield event
                if event.finish_reason is not None:
                    return
        finally:
            if submitted is None:
                self._release()
            else:
                submitted.cancelled.set()

    def health(self) -> EngineHealth:
        """See `Engine.health`."""
        started = self._step_started
        if not self._thread.is_alive():
            return EngineHealth(False, False, "the engine's thread has ended")
        if started is not None and time.monotonic() - started > self.config.max_step_seconds:
            return EngineHealth(False, False, f"one step takes longer than {self.config.max_step_seconds:g} s")
        if self._draining:
            return EngineHealth(True, False, "shutting down")
        if self._admitted > self.config.max_waiting:
            return EngineHealth(True, False, "the queue is full")
        return EngineHealth(True, True)

    def stats(self) -> EngineStats:
        """See `Engine.stats`."""
        with self._lock:
            running = int(self._running is not None)
            return EngineStats(
                running=running,
                waiting=self._admitted - running,
                finished=self._finished,
                cancelled=self._cancelled,
                rejected=self._rejected,
                failed=self._failed,
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

    def _admit(self) -> None:
        if self._draining or not self._thread.is_alive():
            raise EngineStoppedError(STOPPING)
        with self._lock:
            if self._admitted > self.config.max_waiting:
                self._rejected += 1
                seconds = math.ceil(self._answer_seconds * self._admitted)
                raise QueueFullError(
                    f"{self._admitted} requests run or wait already; {self.config.max_waiting + 1} are allowed.",
                    min(max(seconds, 1), MAX_RETRY_AFTER_SECONDS),
                )
            self._admitted += 1

    def _submit(self, job: _Job) -> None:
        with self._lock:  # so that no job lands behind the end mark
            if self._aborted.is_set():
                raise EngineStoppedError(STOPPING)
            self._pending.put(job)

    def _release(self) -> None:
        with self._lock:
            self._admitted -= 1

    def _allowed_tokens(self, request: GenerationRequest, num_prompt_tokens: int) -> int:
        room = self.context_length - num_prompt_tokens
        wanted = request.max_tokens if request.max_tokens is not None else 1
        if wanted > room:
            answer = f" and {wanted} for the answer" if request.max_tokens is not None else ""
            raise RequestError(
                f"this model's context holds {self.context_length} tokens, but the messages take {num_prompt_tokens}"
                f" (pictures included){answer}; shorten the messages or lower max_tokens.",
                "messages",
                "context_length_exceeded",
            )
        return request.max_tokens if request.max_tokens is not None else min(self.config.default_max_tokens, room)

    def _serve(self) -> None:
        while (job := self._pending.get()) is not None:
            with self._lock:
                self._running = job
            started = time.monotonic()
            outcome = self._run(job)
            # The place is free before the client hears of the end, so that its next request finds it.
            with self._lock:
                self._running = None
                self._admitted -= 1
                self._finished += isinstance(outcome, TokenEvent)
                self._failed += isinstance(outcome, ShellVError)
                self._cancelled += outcome is None
                self._answer_seconds += 0.2 * (time.monotonic() - started - self._answer_seconds)
            if outcome is not None:
                job.emit(outcome)

    def _run(self, job: _Job) -> TokenEvent | ShellVError | None:
        """Emit all events but the last and return that one; the error if it failed, None if it was cancelled."""
        import torch

        try:
            with torch.inference_mode():
                for event in self._answer(job):
                    if event.finish_reason is not None:
                        return event
                    job.emit(event)
        except ShellVError as error:
            return error
        except torch.OutOfMemoryError:
            logger.exception("out of memory at a prompt of %d tokens", len(job.prompt.token_ids))
            torch.cuda.empty_cache()
            return GenerationError("the model ran out of memory; shorten the messages or send fewer pictures.")
        except Exception:  # the thread's outermost edge: one request's fault must not end all others
            logger.exception("a request failed inside the model")
            return GenerationError("the model failed on this request; the server's log says why.")
        return None

    def _answer(self, job: _Job) -> Iterator[TokenEvent]:
        """Events of one answer, to be read up to the one with a finish reason; none follows a cancellation."""
        request, num_prompt_tokens = job.request, len(job.prompt.token_ids)
        detokenizer = Detokenizer(self._tokenizer, (*request.stop, *self._stop_strings))
        generator = self._generator(request)
        steps = self._steps(job.prompt)
        token_id: int | None = None
        for count in itertools.count(1):
            if job.cancelled.is_set():
                return
            if self._aborted.is_set():
                raise EngineStoppedError("the server stopped before the answer's end.")
            token_id = sample(self._step(steps, token_id), request.temperature, request.top_p, generator)
            ended = token_id in self._end_ids
            text = "" if ended else detokenizer.push(token_id)
            if ended or count == job.max_tokens:
                text += detokenizer.finish()
            reason: FinishReason | None = "stop" if ended or detokenizer.stopped else None
            if reason is None and count == job.max_tokens:
                reason = "length"
            yield TokenEvent(text, num_prompt_tokens, count, reason)

    def _step(self, steps: Any, token_id: int | None) -> torch.Tensor:
        """Run the model once; returns the last position's logits [vocabulary], checked to be finite."""
        self._step_started = time.monotonic()
        try:
            logits_V: torch.Tensor = steps.send(token_id)
        finally:
            self._step_started = None
        if not bool(logits_V.isfinite().all()):
            raise GenerationError("the model returned numbers that are not finite; its weights may be damaged.")
        return logits_V

    def _steps(self, prompt: Prompt) -> Any:
        """Coroutine over the model: send None for the prompt, then each chosen token; yields logits [vocabulary]."""
        import torch

        device = self._model.device
        input_ids = torch.tensor([prompt.token_ids], device=device)
        images = {}
        if prompt.pixel_values is not None:
            images["pixel_values"] = prompt.pixel_values.to(device, self._model.dtype)
        past: Any = None
        length = 0
        while True:
            length += input_ids.shape[1]
            output = self._model(
                input_ids=input_ids,
                attention_mask=torch.ones((1, length), dtype=torch.long, device=device),
                past_key_values=past,
                use_cache=True,
                logits_to_keep=1,
                **images,
            )
            past, images = output.past_key_values, {}
            token_id = yield output.logits[0, -1]
            input_ids = torch.tensor([[token_id]], device=device)

    def _generator(self, request: GenerationRequest) -> torch.Generator | None:
        import torch

        if request.temperature == 0:
            return None
        generator = torch.Generator()
        if request.seed is None:
            generator.seed()
        else:
            generator.manual_seed(request.seed)
        return generator


def _context_length(model: Any, tokenizer: Any) -> int:
    positions = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    # Tokenizers without a limit of their own report an astronomic one.
    return int(min(positions or tokenizer.model_max_length, tokenizer.model_max_length))


def _end_ids(model: Any, tokenizer: Any) -> frozenset[int]:
    found = model.generation_config.eos_token_id
    ids = found if isinstance(found, list) else [found]
    return frozenset(token_id for token_id in [*ids, tokenizer.eos_token_id] if token_id is not None)
