"""Packed batches for training, straight from the shards: read, decoded and tokenized ahead by threads.

Where a run stands is three values: the plan's hash, the epoch and the step. From them any number of ranks goes on
exactly there.
"""

from __future__ import annotations

import functools
import hashlib
import json
import time
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from shellv_core.data.decode import decode_image
from shellv_core.data.encoder import ConversationEncoder
from shellv_core.data.lengths import ConversationLengths, conversation_lengths, image_token_fault
from shellv_core.data.packing import PLAN_VERSION, EpochPlan, check_lengths, document_layout, plan_epoch
from shellv_core.data.reader import SplitReader
from shellv_core.data.samples import Conversation, HallucinatedCaption, Sample
from shellv_core.errors import ConfigError, DataError
from shellv_core.logs import get_logger

if TYPE_CHECKING:
    import torch

logger = get_logger(__name__)

NO_IMAGE = -1
IGNORE_INDEX = -100
READ_AHEAD_STEPS = 8
READ_AHEAD_PACKS = 32  # at least
TooLong = Literal["error", "cut", "leave_out"]


@dataclass(frozen=True)
class Source:
    """A split to train on.

    Attributes:
        weight: its share of an epoch's samples, in any unit; None, for all sources, for their sizes.
    """

    reader: SplitReader
    weight: float | None = None


@dataclass(frozen=True)
class PackedBatch:
    """One pack: D documents, conversations about I images, in T tokens.

    Attributes:
        input_ids, labels: int64 (T,); labels are -100 where nothing is learned, not shifted. The first token of a
            document is never learned, as only the document before could predict it.
        position_ids: int64 (T,), from 0 in each document.
        cu_seqlens: int32 (D + 1,), borders of the documents, 0 and T included.
        images: uint8 (I, 3, image_size, image_size), for `decode.normalize`.
        captions: I true captions; None where the sample has none.
        hallucinated: I rows of hallucinated captions; empty where there are none.
        image_index: int64 (D,), the document's row in `images`, -1 for text. Documents may share an image.
        keys: D keys of the samples.
        documents: int64 (D,), numbers of the documents in the loader's sources.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    cu_seqlens: torch.Tensor
    images: torch.Tensor
    image_index: torch.Tensor
    captions: tuple[str | None, ...]
    hallucinated: tuple[tuple[HallucinatedCaption, ...], ...]
    keys: tuple[str, ...]
    documents: torch.Tensor

    def to(self, device: torch.device, non_blocking: bool = False) -> PackedBatch:
        """Copy to `device`."""
        return PackedBatch(
            **{
                name: value.to(device, non_blocking=non_blocking) if hasattr(value, "to") else value
                for name, value in vars(self).items()
            }
        )


@dataclass(frozen=True)
class _Document:
    sample: Sample
    conversation: Conversation
    number: int
    image: tuple[int, int] | None  # source and sample, equal where the image is


class PackedLoader:
    """Iterates the optimizer steps of the current epoch from the current step: each a list of this rank's packs.

    All ranks together get the global batch, whatever their number. Where their number does not divide it, and in the
    last step of an epoch, some ranks get fewer packs, or an empty list; they must take part in the step all the same.
    After an epoch's last step the loader stands at the next epoch's first, and iterating anew goes on there.

    Args:
        sources: splits to mix. A source that is asked for more samples than it has repeats them in a fresh order; one
            that is asked for less goes on with the rest in the next epoch.
        encoder: makes token ids of conversations.
        num_image_tokens: tokens of an image.
        image_size: side of the square pictures, in pixels.
        padding: color around images that are not square, or None to cut their middle out; see `decode.decode_image`.
        max_length: tokens of a pack.
        global_batch: packs of an optimizer step, over all ranks.
        max_document_length: tokens of a conversation, by default as many as a pack has.
        too_long: what becomes of longer conversations: an error now, cut at the end, or left out; the last two are
            counted in `num_too_long` and logged.
        samples_per_epoch: by default as many as the sources have together.
        num_workers: threads that decode and tokenize; what comes out does not depend on them.

    Attributes:
        epoch, step: what comes next.
        num_too_long: conversations that were cut or left out, of all in the sources.
        seconds_waited: how long iteration waited for packs so far.

    Raises:
        ConfigError: if the arguments do not fit together.
        DataError: if a conversation is too long (and `too_long` is "error") or cannot be encoded.
    """

    def __init__(
        self,
        sources: Sequence[Source],
        encoder: ConversationEncoder,
        *,
        num_image_tokens: int,
        image_size: int,
        padding: Sequence[int] | None,
        max_length: int,
        global_batch: int,
        seed: int,
        rank: int = 0,
        world_size: int = 1,
        num_workers: int = 2,
        too_long: TooLong = "error",
        samples_per_epoch: int | None = None,
        max_document_length: int | None = None,
    ) -> None:
        _check_arguments(sources, global_batch, rank, world_size, num_workers, too_long, samples_per_epoch)
        self.sources, self.encoder = list(sources), encoder
        self.num_image_tokens, self.image_size, self.padding = num_image_tokens, image_size, padding
        self.max_length, self.global_batch, self.seed = max_length, global_batch, seed
        self.rank, self.world_size, self.num_workers = rank, world_size, num_workers
        self.max_document_length = min(max_document_length or max_length, max_length)
        self.too_long, self.samples_per_epoch = too_long, samples_per_epoch
        self.epoch = self.step = 0
        self.num_too_long = 0
        self.seconds_waited = 0.0
        self._plans: dict[int, EpochPlan] = {}
        self._lengths = [conversation_lengths(source.reader, encoder) for source in sources]
        self._set_documents(self._lengths)

    def plan(self, epoch: int) -> EpochPlan:
        """The packs of an epoch."""
        if epoch not in self._plans:
            weights = [source.weight for source in self.sources if source.weight is not None]
            self._plans = {
                epoch: plan_epoch(
                    self._document_offsets,
                    self._document_lengths,
                    self.max_length,
                    self.global_batch,
                    self.seed,
                    epoch,
                    weights or None,
                    self.samples_per_epoch,
                )
            }
        return self._plans[epoch]

    def num_steps(self, epoch: int | None = None) -> int:
        """Steps of an epoch, by default of the current one."""
        return self.plan(self.epoch if epoch is None else epoch).num_steps

    @functools.cached_property
    def plan_hash(self) -> str:
        """Hash of everything that decides which documents are in which pack of any epoch."""
        what = {
            "version": PLAN_VERSION,
            "sources": [
                [source.reader.source.content_sha256, source.reader.split, source.weight] for source in self.sources
            ],
            "encoder": [self.encoder.identity, self.encoder.tasks],
            "num_image_tokens": self.num_image_tokens,
            "max_length": [self.max_length, self.max_document_length],
            "global_batch": self.global_batch,
            "seed": self.seed,
            "too_long": self.too_long,
            "samples_per_epoch": self.samples_per_epoch,
            "first_epoch": self.plan(0).sha256(),
        }
        return hashlib.sha256(json.dumps(what, sort_keys=True).encode()).hexdigest()

    def state_dict(self) -> dict[str, Any]:
        """Where the loader stands: the step after the one that iteration gave last. Equal on all ranks."""
        return {"plan_hash": self.plan_hash, "epoch": self.epoch, "step": self.step}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go to where `state` was taken, on this or another number of ranks.

        Raises:
            ConfigError: if the state belongs to another plan.
        """
        if state["plan_hash"] != self.plan_hash:
            raise ConfigError(
                f"the saved position belongs to another plan ({str(state['plan_hash'])[:12]}, this loader has"
                f" {self.plan_hash[:12]}): data, weights, tokenizer, template, max_length, global batch or seed differ."
                " Resume with the settings of the interrupted run, or start a new one."
            )
        epoch, step = int(state["epoch"]), int(state["step"])
        if epoch < 0 or not 0 <= step < self.num_steps(epoch):
            raise ConfigError(
                f"the saved position, step {step} of epoch {epoch}, does not exist: that epoch has"
                f" {self.num_steps(max(epoch, 0))} steps."
            )
        self.epoch, self.step = epoch, step

    def __iter__(self) -> Generator[list[PackedBatch], None, None]:
        plan, start = self.plan(self.epoch), self.step
        with _Prefetch(self, plan, start) as prefetch:
            for step in range(start, plan.num_steps):
                begun = time.perf_counter()
                packs = [prefetch.next() for _ in plan.rank_packs(step, self.rank, self.world_size)]
                self.seconds_waited += time.perf_counter() - begun
                last = step + 1 == plan.num_steps
                self.epoch, self.step = (self.epoch + 1, 0) if last else (self.epoch, step + 1)
                yield packs

    def most_images(self, num_steps: int) -> int:
        """The most pictures that a pack of the first epoch's first `num_steps` steps has."""
        plan = self.plan(0)
        offsets = plan.offsets[: num_steps * self.global_batch + 1]
        documents = self._kept[plan.documents[: offsets[-1]]]
        starts = np.concatenate(
            [first + lengths.offsets[:-1] for first, lengths in zip(self._first_document, self._lengths, strict=True)]
        )
        has_image = np.concatenate([lengths.has_image for lengths in self._lengths])[documents]
        pack_of = np.repeat(np.arange(len(offsets) - 1), np.diff(offsets))
        images = np.stack([pack_of, np.searchsorted(starts, documents, side="right")])[:, has_image]
        return int(np.bincount(np.unique(images, axis=1)[0]).max(initial=0))

    def _read_packs(self, plan: EpochPlan, numbers: np.ndarray) -> dict[int, list[_Document]]:
        """The documents of some packs, read together."""
        documents = [self._kept[plan.pack(number)] for number in numbers]
        wanted = np.unique(np.concatenate(documents))
        found: dict[int, _Document] = {}
        for source, (first, lengths) in enumerate(zip(self._first_document, self._lengths, strict=True)):
            mine = wanted[(wanted >= first) & (wanted < first + lengths.offsets[-1])] - first
            rows = np.searchsorted(lengths.offsets, mine, side="right") - 1
            samples = self.sources[source].reader.read(rows)
            for local, row, sample in zip(mine.tolist(), rows.tolist(), samples, strict=True):
                conversations = self.encoder.conversations(sample)
                found[first + local] = _Document(
                    sample,
                    conversations[local - int(lengths.offsets[row])],
                    first + local,
                    None if sample.image is None else (source, row),
                )
        return {
            int(number): [found[document] for document in pack.tolist()]
            for number, pack in zip(numbers, documents, strict=True)
        }

    def _build_pack(self, documents: Sequence[_Document]) -> PackedBatch:
        """Tokenize and decode a pack."""
        import torch

        encoded = self.encoder([document.conversation for document in documents], self.num_image_tokens)
        for document, (input_ids, _) in zip(documents, encoded, strict=True):
            self._check(document, input_ids)
        shown = {document.image: document.sample for document in documents if document.image is not None}
        row_of_image = {image: row for row, image in enumerate(shown)}
        images = torch.empty(len(shown), 3, self.image_size, self.image_size, dtype=torch.uint8)
        for row, sample in enumerate(shown.values()):
            images[row] = self._decode(sample)
        image_index = [NO_IMAGE if document.image is None else row_of_image[document.image] for document in documents]
        limit = self.max_document_length
        parts = [(ids[:limit], labels[:limit]) for ids, labels in encoded]
        position_ids, borders = document_layout(np.asarray([len(ids) for ids, _ in parts], dtype=np.int64))
        labels = np.concatenate([labels for _, labels in parts]).astype(np.int64)
        labels[borders[:-1]] = IGNORE_INDEX
        return PackedBatch(
            input_ids=torch.from_numpy(np.concatenate([ids for ids, _ in parts]).astype(np.int64)),
            labels=torch.from_numpy(labels),
            position_ids=torch.from_numpy(position_ids),
            cu_seqlens=torch.from_numpy(borders),
            images=images,
            image_index=torch.tensor(image_index, dtype=torch.int64),
            captions=tuple(sample.caption for sample in shown.values()),
            hallucinated=tuple(sample.hallucinated_captions for sample in shown.values()),
            keys=tuple(document.sample.key for document in documents),
            documents=torch.tensor([document.number for document in documents], dtype=torch.int64),
        )

    def _set_documents(self, all_lengths: Sequence[ConversationLengths]) -> None:
        """Number the conversations of all sources, those that are left out aside."""
        first = np.cumsum([0, *(len(lengths.num_tokens) for lengths in all_lengths)])
        tokens = np.concatenate([lengths.with_images(self.num_image_tokens) for lengths in all_lengths])
        fits = tokens <= self.max_document_length
        self.num_too_long = int((~fits).sum())
        if self.too_long == "error":
            check_lengths(tokens, self.max_document_length)
        elif self.num_too_long:
            done = "cut" if self.too_long == "cut" else "left out"
            logger.warning(
                f"{self.num_too_long} of {len(tokens)} conversations have more than {self.max_document_length} tokens"
                f" (the longest {tokens.max()}) and are {done}."
            )
        self._num_tokens = tokens
        self._first_document = first[:-1].tolist()
        # The plan counts the conversations that are kept; `_kept` gives their numbers among all.
        self._kept = np.flatnonzero(fits) if self.too_long == "leave_out" else np.arange(len(tokens))
        self._document_lengths = np.minimum(tokens[self._kept], self.max_document_length)
        self._document_offsets = [
            np.searchsorted(self._kept, lengths.offsets + start)
            for start, lengths in zip(self._first_document, all_lengths, strict=True)
        ]

    def _check(self, document: _Document, input_ids: np.ndarray) -> None:
        if fault := image_token_fault(input_ids, self.encoder, document.sample, self.num_image_tokens):
            raise DataError(f"sample {document.sample.key!r}: {fault}")
        if len(input_ids) != self._num_tokens[document.number]:
            raise DataError(
                f"sample {document.sample.key!r}: a conversation has {len(input_ids)} tokens, its recorded length is"
                f" {self._num_tokens[document.number]}. The data was prepared for another tokenizer or template, or the"
                " cache of lengths is stale: prepare the data again, or delete cache/lengths below the project folder."
            )

    def _decode(self, sample: Sample) -> torch.Tensor:
        try:
            return decode_image(sample.image or b"", self.image_size, self.padding)
        except DataError as error:
            raise DataError(f"sample {sample.key!r}: {error}") from None


class _Prefetch:
    """Makes the packs of one rank in their order, some ahead.

    Packs of one unit are read together, a few steps before the first of them is needed; each is given free as it is
    built. At most the open windows of the rank's lanes are in memory, and a few built packs.
    """

    def __init__(self, loader: PackedLoader, plan: EpochPlan, start: int) -> None:
        self._loader, self._plan = loader, plan
        steps = range(start, plan.num_steps)
        numbers = [n for step in steps for n in plan.rank_packs(step, loader.rank, loader.world_size)]
        self._numbers = np.asarray(numbers, dtype=np.int64)
        self._units = plan.units[self._numbers]
        # Units by the position of the first pack that needs them.
        self._to_read = deque(np.sort(np.unique(self._units, return_index=True)[1]).tolist())
        self._build_ahead = 2 * loader.num_workers
        ahead = READ_AHEAD_STEPS * -(-plan.global_batch // loader.world_size)
        self._read_ahead = self._build_ahead + max(READ_AHEAD_PACKS, ahead)
        self._read: dict[int, Future[dict[int, list[_Document]]]] = {}
        self._built: deque[Future[PackedBatch]] = deque()
        self._position = 0  # of the next pack to hand to a builder

    def __enter__(self) -> _Prefetch:
        self._readers = ThreadPoolExecutor(2, thread_name_prefix="unit")
        self._builders = ThreadPoolExecutor(self._loader.num_workers, thread_name_prefix="pack")
        self._submit()
        return self

    def __exit__(self, *_: object) -> None:
        for pool in (self._builders, self._readers):
            pool.shutdown(wait=False, cancel_futures=True)
        for pool in (self._readers, self._builders):
            pool.shutdown(wait=True)

    def next(self) -> PackedBatch:
        """The next pack of this rank."""
        future = self._built.popleft()
        self._submit()
        return future.result()

    def _submit(self) -> None:
        while self._to_read and self._to_read[0] <= self._position + self._read_ahead:
            unit = int(self._units[self._to_read.popleft()])
            numbers = self._numbers[self._units == unit]
            self._read[unit] = self._readers.submit(self._loader._read_packs, self._plan, numbers)
        while self._position < len(self._numbers) and len(self._built) < self._build_ahead:
            number, unit = int(self._numbers[self._position]), int(self._units[self._position])
            self._built.append(self._builders.submit(self._build, number, self._read[unit]))
            self._position += 1

    def _build(self, number: int, unit: Future[dict[int, list[_Document]]]) -> PackedBatch:
        return self._loader._build_pack(unit.result().pop(number))


def _check_arguments(
    sources: Sequence[Source],
    global_batch: int,
    rank: int,
    world_size: int,
    num_workers: int,
    too_long: str,
    samples_per_epoch: int | None,
) -> None:
    faults = []
    if not sources:
        faults.append("there is no source to train on")
    weights = [source.weight for source in sources if source.weight is not None]
    if weights and len(weights) != len(sources):
        faults.append(f"{len(weights)} of {len(sources)} sources have a weight; give all of them one, or none")
    elif weights and (min(weights) < 0 or not 0 < sum(weights) < float("inf")):
        faults.append(f"weights are {weights}; they must not be negative, and one must be above 0")
    if not 0 <= rank < world_size:
        faults.append(f"rank is {rank}; with world_size={world_size} it must be 0 to {world_size - 1}")
    if global_batch < 1 or world_size < 1:
        faults.append(f"global_batch={global_batch} packs and world_size={world_size} ranks must both be at least 1")
    if num_workers < 1:
        faults.append(f"num_workers is {num_workers}; at least 1 is needed")
    if too_long not in get_args(TooLong):
        faults.append(f"too_long is {too_long!r}; it must be one of {', '.join(get_args(TooLong))}")
    if samples_per_epoch is not None and samples_per_epoch < 1:
        faults.append(f"samples_per_epoch is {samples_per_epoch}; at least 1 is needed")
    if faults:
        raise ConfigError("; ".join(faults) + ".")
