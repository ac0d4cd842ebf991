"""Many requests at once: in every step some prompts are read further, and each other request gets its next token."""

from __future__ import annotations

import itertools
import time
from collections import deque
from typing import TYPE_CHECKING, Any, TypeVar

from shellv_core.logs import get_logger
from shellv_core.serving.engine import GenerationError
from shellv_core.serving.inference.adapters import AdapterSet
from shellv_core.serving.inference.answer import Answer, Vocabulary
from shellv_core.serving.inference.cache import SlotCache
from shellv_core.serving.inference.forward import Forward
from shellv_core.serving.inference.images import ImageFeatures
from shellv_core.serving.inference.job import FAULT, NOT_FINITE, OUT_OF_MEMORY, Counters, Delivery, Job, post
from shellv_core.serving.inference.memory import is_out_of_memory
from shellv_core.serving.inference.slots import Row, SlotTable, content_ids, image_positions, pending_images
from shellv_core.serving.sampling import Choice, choose

if TYPE_CHECKING:
    import torch

logger = get_logger(__name__)
T = TypeVar("T")

#: Answers that must end well before a slot that was given up for want of memory is tried again.
ANSWERS_PER_SLOT = 32


class SlotRunner:
    """Runs up to `slots` requests side by side.

    Args:
        model: a LLaVA model of transformers whose language model attends to all positions.
        slots: rows at most.
        max_tokens: positions of all rows together at most.
        chunk_tokens: tokens of prompts that one step reads at most.
    """

    def __init__(
        self,
        model: Any,
        vocabulary: Vocabulary,
        counters: Counters,
        adapters: AdapterSet,
        images: ImageFeatures,
        slots: int,
        max_tokens: int,
        chunk_tokens: int,
    ) -> None:
        self.slots, self._all_slots, self._chunk_tokens = slots, slots, chunk_tokens
        self._model, self._vocabulary, self._counters, self._images = model, vocabulary, counters, images
        cache = SlotCache(model.config.get_text_config().num_hidden_layers)
        self._table = SlotTable(cache, slots, max_tokens)
        self._forward = Forward(model, adapters, cache)
        self._orders = itertools.count()
        self._ended_well = 0
        counters.kv_capacity = max_tokens

    @property
    def jobs(self) -> list[Job]:
        """See `Runner.jobs`."""
        return [row.job for row in self._table.rows]

    def step(self, waiting: deque[Job]) -> list[Delivery]:
        """See `Runner.step`."""
        deliveries = self._drop_cancelled()
        deliveries += self._admit(waiting)
        deliveries += self._see_images()
        deliveries += self._read()
        if decoding := self._table.decoding:
            deliveries += self._advance(decoding, [1] * len(decoding))
        self._counters.kv_tokens = sum(row.filled for row in self._table.rows)
        return deliveries

    def _drop_cancelled(self) -> list[Delivery]:
        cancelled = [row for row in self._table.rows if row.job.cancelled.is_set()]
        for row in cancelled:
            self._table.remove(row)
        return [Delivery(row.job, None) for row in cancelled]

    def _admit(self, waiting: deque[Job]) -> list[Delivery]:
        while waiting and len(self._table.rows) < self.slots:
            prompt = waiting[0].task.prompt
            need = len(prompt.token_ids) + waiting[0].task.max_tokens
            if not self._table.fits(need):
                break
            job = waiting.popleft()
            job.started = time.monotonic()
            answer = Answer(job.task, self._vocabulary, self._model.device)
            row = Row(job, answer, content_ids(prompt), need, next(self._orders))
            row.image_positions, row.features = image_positions(prompt), [None] * len(prompt.images)
            if not self._place(row):
                return [Delivery(job, GenerationError(OUT_OF_MEMORY))]
            self._counters.prompt_tokens += len(prompt.token_ids)
            self._counters.prefix_tokens += row.filled
            post([Delivery(job, answer.opening())])
        return []

    def _place(self, row: Row) -> bool:
        """Give a row its slot; False if there is no memory for it, not even after all that can be freed was."""
        for last in (False, True):
            try:
                self._table.add(row)
                return True
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                logger.exception("no memory for keys and values of %d more tokens", row.need)
                self._counters.out_of_memory += 1
                if not last:
                    self._save_memory()
        return False

    def _see_images(self) -> list[Delivery]:
        """Get the features that the next rows need: the vision tower sees as many pictures as a step's prompts take,
        and no more, since everyone waits for it."""
        deliveries: list[Delivery] = []
        room = self._chunk_tokens
        for row in self._table.reading:
            for index in pending_images(row):
                if row.features[index] is not None:
                    continue
                if room <= 0:
                    return deliveries
                image = row.job.task.prompt.images[index]
                room -= 0 if self._images.known(image, row.adapter) else image.num_tokens
                try:
                    row.features[index] = self._images.get(image, row.adapter)
                except Exception as error:  # one request's fault must not end all others
                    logger.exception("a picture failed inside the model")
                    deliveries.append(self._fail(row, error))
                    break
        return deliveries

    def _read(self) -> list[Delivery]:
        """Read the oldest prompt's next piece, and beside it the following prompts that fit whole."""
        group: list[Row] = []
        width = 0
        for row in self._table.reading:
            if any(row.features[index] is None for index in pending_images(row)):
                break
            wider = max(width, min(row.prompt_length - row.filled, self._chunk_tokens))
            if (len(group) + 1) * wider > self._chunk_tokens:
                break
            group, width = [*group, row], wider
        if not group:
            return []
        return self._advance(group, [min(row.prompt_length - row.filled, width) for row in group])

    def _advance(self, rows: list[Row], counts: list[int]) -> list[Delivery]:
        """Read `counts` more tokens of each row, and choose the next one of each that has read its whole prompt."""
        deliveries: list[Delivery] = []
        for part, logits_BV in self._attempt(rows, counts, deliveries):
            ready = [index for index, row in enumerate(part) if row.decodes]
            answering = [part[index] for index in ready]
            for row in answering:
                if row.slot >= self._table.num_decoding:
                    self._table.start_decoding(row)
            if ready:
                choices = choose(logits_BV[ready], [row.answer.sampler for row in answering])
                deliveries += [self._take(row, choice) for row, choice in zip(answering, choices, strict=True)]
        return deliveries

    def _attempt(
        self, rows: list[Row], counts: list[int], deliveries: list[Delivery]
    ) -> list[tuple[list[Row], torch.Tensor]]:
        """Logits of the rows, in one part if all goes well.

        When memory runs out, the step is tried once more with all that can be freed, and then with one row less at a
        time, the newest first. At any other fault every row is tried alone, so that the one at fault fails alone.
        """
        tries = 0
        while rows:
            try:
                logits_BV = self._forward(rows, counts)
                # At once, for all: whatever moves rows from now on moves what they have just read as well.
                for row, count in zip(rows, counts, strict=True):
                    row.filled += count
                return [(rows, logits_BV)]
            except Exception as error:  # one request's fault must not end all others
                logger.exception("a step of %d requests failed inside the model", len(rows))
                if not is_out_of_memory(error):
                    if len(rows) == 1:
                        deliveries.append(self._fail(rows[0], error))
                        return []
                    alone = [self._attempt([row], [count], deliveries) for row, count in zip(rows, counts, strict=True)]
                    return [part for parts in alone for part in parts]
                self._counters.out_of_memory += 1
                if tries:
                    newest = max(range(len(rows)), key=lambda index: rows[index].order)
                    deliveries.append(self._fail(rows[newest], error))
                    rows, counts = _without(rows, newest), _without(counts, newest)
            tries += 1
            self._save_memory()
        return []

    def _take(self, row: Row, choice: Choice | None) -> Delivery:
        if choice is None:
            self._counters.nonfinite += 1
            self._counters.nonfinite_in_a_row += 1
            # What is not finite would spread to whoever gets the slot next, even from masked positions.
            self._table.remove(row, remember=False)
            return Delivery(row.job, GenerationError(NOT_FINITE))
        self._counters.nonfinite_in_a_row = 0
        self._counters.completion_tokens += 1
        row.contents.append(choice.token_id)
        delivery = Delivery(row.job, row.answer.advance(choice))
        if delivery.last:
            self._table.remove(row)
            self._regain_slot()
        return delivery

    def _fail(self, row: Row, error: Exception) -> Delivery:
        self._table.remove(row, remember=False)
        return Delivery(row.job, GenerationError(OUT_OF_MEMORY if is_out_of_memory(error) else FAULT))

    def _save_memory(self) -> None:
        """Run half as many requests from now on, and free what only saves time."""
        import torch

        self.slots = max(self.slots // 2, 1)
        self._ended_well = 0
        self._images.clear()
        self._table.forget()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        logger.warning("out of memory: at most %d requests run at once from now on", self.slots)

    def _regain_slot(self) -> None:
        self._ended_well += 1
        if self.slots < self._all_slots and self._ended_well % ANSWERS_PER_SLOT == 0:
            self.slots += 1


def _without(items: list[T], index: int) -> list[T]:
    return items[:index] + items[index + 1 :]
