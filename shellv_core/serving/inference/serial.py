"""One request after the other, each by the model's own forward pass and cache: what slots are held against."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from shellv_core.logs import get_logger
from shellv_core.serving.engine import GenerationError
from shellv_core.serving.inference.adapters import AdapterSet
from shellv_core.serving.inference.answer import Answer, Vocabulary
from shellv_core.serving.inference.job import FAULT, NOT_FINITE, OUT_OF_MEMORY, Counters, Delivery, Job, Outcome, post
from shellv_core.serving.inference.memory import is_out_of_memory
from shellv_core.serving.prompt import Prompt
from shellv_core.serving.sampling import choose

if TYPE_CHECKING:
    import torch

logger = get_logger(__name__)


@dataclass(frozen=True)
class _Running:
    job: Job
    answer: Answer
    steps: Generator[torch.Tensor, int, None]


class SerialRunner:
    """Runs the oldest request to its end.

    Args:
        model: a LLaVA model of transformers.
    """

    slots = 1

    def __init__(self, model: Any, vocabulary: Vocabulary, counters: Counters, adapters: AdapterSet) -> None:
        self._model, self._vocabulary, self._counters, self._adapters = model, vocabulary, counters, adapters
        self._running: _Running | None = None

    @property
    def jobs(self) -> list[Job]:
        """See `Runner.jobs`."""
        return [self._running.job] if self._running else []

    def step(self, waiting: deque[Job]) -> list[Delivery]:
        """See `Runner.step`."""
        running = self._running = self._running or self._begin(waiting.popleft())
        delivery = Delivery(running.job, self._advance(running))
        if delivery.last:
            self._running = None
        return [delivery]

    def _begin(self, job: Job) -> _Running:
        job.started = time.monotonic()
        self._counters.prompt_tokens += len(job.task.prompt.token_ids)
        answer = Answer(job.task, self._vocabulary, self._model.device)
        post([Delivery(job, answer.opening())])
        return _Running(job, answer, self._forward(job.task.prompt))

    def _advance(self, running: _Running) -> Outcome:
        """The next token's event; None if the request was cancelled."""
        import torch

        job, answer = running.job, running.answer
        if job.cancelled.is_set():
            return None
        try:
            last = answer.token_ids[-1:]
            with self._adapters.alone(job.task.request.adapter):
                logits_1V = running.steps.send(last[0]) if last else next(running.steps)
        except Exception as error:  # one request's fault must not end all others
            if is_out_of_memory(error):
                logger.error("out of memory at a prompt of %d tokens: %s", len(job.task.prompt.token_ids), error)
                self._counters.out_of_memory += 1
                torch.cuda.empty_cache()
                return GenerationError(OUT_OF_MEMORY)
            logger.exception("a request failed inside the model")
            return GenerationError(FAULT)
        choice = choose(logits_1V, [answer.sampler])[0]
        if choice is None:
            self._counters.nonfinite += 1
            self._counters.nonfinite_in_a_row += 1
            return GenerationError(NOT_FINITE)
        self._counters.nonfinite_in_a_row = 0
        self._counters.completion_tokens += 1
        return answer.advance(choice)

    def _forward(self, prompt: Prompt) -> Generator[torch.Tensor, int, None]:
        """Yields the logits [1, vocabulary] after the prompt, then after each token that is sent."""
        import torch

        device = self._model.device
        input_ids = torch.tensor([prompt.token_ids], device=device)
        images = {}
        if (pixel_values := prompt.pixel_values) is not None:
            images["pixel_values"] = pixel_values.to(device, self._model.dtype)
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
            token_id = yield output.logits[:, -1]
            input_ids = torch.tensor([[token_id]], device=device)
