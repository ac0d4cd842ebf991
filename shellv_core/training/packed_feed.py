"""Optimizer steps from packs that are read, decoded and tokenized ahead while the model computes."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from transformers import LlavaProcessor

from shellv_core.data.conversation import IGNORE_INDEX, encode_conversations
from shellv_core.data.decode import normalize, padding_color
from shellv_core.data.encoder import ConversationEncoder
from shellv_core.data.lengths import conversation_lengths
from shellv_core.data.loader import PackedBatch, PackedLoader, Source
from shellv_core.data.reader import SplitReader
from shellv_core.errors import ConfigError
from shellv_core.logs import get_logger
from shellv_core.models.compose import num_image_tokens
from shellv_core.storage import InputDirectory
from shellv_core.templates import template_of
from shellv_core.training.attention import documents_apart
from shellv_core.training.config import TrainingConfig
from shellv_core.training.engines.base import precision
from shellv_core.training.features import tower_features
from shellv_core.training.loop import Part, StepData
from shellv_core.training.model import TrainingModel
from shellv_core.training.packed import PackedRow, make_row, pack_contrast
from shellv_core.training.pairs import ContrastBatch
from shellv_core.training.processes import first_on_node, num_processes, rank, sums

logger = get_logger(__name__)


class PackedFeed:
    """The steps of a loader; see `loop.Feed`."""

    def __init__(
        self, module: TrainingModel, processor: LlavaProcessor, loader: PackedLoader, config: TrainingConfig
    ) -> None:
        self.module, self.processor, self.loader, self.config = module, processor, loader, config
        self.total = _total_steps(loader, config)
        image_processor = processor.image_processor
        self._mean, self._std = list(image_processor.image_mean), list(image_processor.image_std)
        self.identity = [loader.plan_hash, loader.image_size, self._mean, self._std]

    def steps(self, first: int, position: dict[str, Any] | None) -> Iterator[StepData]:
        """See `Feed`."""
        if position is not None:
            self.loader.load_state_dict(position)
        step = first
        while step < self.total:
            with contextlib.closing(iter(self.loader)) as steps:
                for packs in steps:
                    step += 1
                    yield self._step(packs, step)
                    if step == self.total:
                        break

    def largest_pack(self) -> tuple[int, int]:
        """Tokens of a full pack, and the most pictures that one of the run's has in the first epoch."""
        return self.loader.max_length, self.loader.most_images(self.total)

    def position(self) -> dict[str, Any]:
        """See `Feed`."""
        return self.loader.state_dict()

    def seconds_waited(self) -> float:
        """See `Feed`."""
        return self.loader.seconds_waited

    def attention(self) -> contextlib.AbstractContextManager[None]:
        """See `Feed`."""
        return documents_apart(self.module.model.model.language_model)

    def _step(self, packs: list[PackedBatch], turn: int) -> StepData:
        contrasts: list[ContrastBatch | None] = [None] * len(packs)
        if self.module.heads is not None:
            hacl, tokenizer = self.module.hacl, self.processor.tokenizer
            contrasts = [
                pack_contrast(pack, tokenizer, hacl.num_hallucinated, turn, hacl.truth_weight > 0) for pack in packs
            ]
        counts = [0 if contrast is None else len(contrast.images) for contrast in contrasts]
        # An epoch's last step may have fewer packs than others, and some processes none.
        most = -(-self.loader.global_batch // self.loader.world_size)
        missing = [0] * (most - len(packs))
        num_labels, *totals = sums([sum(map(_num_labels, packs)), *counts, *missing, *([1] * len(packs)), *missing])
        num_parts = sum(total > 0 for total in totals[most:])
        parts = self._parts(packs, contrasts, counts, totals[:num_parts], sum(totals[:most]))
        return StepData(parts, num_parts, int(num_labels))

    def _parts(
        self,
        packs: list[PackedBatch],
        contrasts: list[ContrastBatch | None],
        counts: list[int],
        totals: list[float],
        total: float,
    ) -> Iterator[Part]:
        """Rows of the packs.

        Args:
            counts: images in contrast, of each pack.
            totals: the same, of each pass in all processes.
            total: of the step.
        """
        for number, together in enumerate(totals):
            has = number < len(packs)
            row = self._row(packs[number], contrasts[number]) if has else PackedRow.idle(self.module.eos_token_id)
            own_share = num_processes() * (counts[number] if has else 0) / max(total, 1)
            share = together / max(total, 1) if self.module.hacl.gather else own_share
            yield Part(row, share, own_share)

    def _row(self, pack: PackedBatch, contrast: ContrastBatch | None) -> PackedRow:
        model = self.module.model
        features = None
        if len(pack.images):
            pixel_values = normalize(pack.images.to(model.device), self._mean, self._std)
            with precision(self.config.precision == "bf16" and model.device.type != "cpu", model.device):
                features = tower_features(model, pixel_values)
        return make_row(
            pack,
            features,
            model.config.image_token_id,
            self.module.eos_token_id,
            contrast,
            self.config.loss_chunk,
            self.loader.max_length,
        )


@contextlib.contextmanager
def packed_feed(
    module: TrainingModel,
    processor: LlavaProcessor,
    source: InputDirectory | None,
    split: str,
    config: TrainingConfig,
    seed: int,
) -> Iterator[PackedFeed]:
    """A feed of the packs of a split.

    Raises:
        ConfigError: if there is no source of shards, or a preference is to be learned, which has no packed form.
        DataError: if the split has no index or cannot be encoded.
    """
    if source is None:
        raise ConfigError("training.packing=true reads shards of prepare_data; there are none here. Set it to false.")
    if module.preference.weight:
        raise ConfigError(
            f"preference.weight={module.preference.weight} does not go together with training.packing=true; set"
            " training.packing=false or preference.weight=0."
        )
    encoder = ConversationEncoder(
        processor.tokenizer,
        module.model.config.image_token_id,
        config.tasks,
        functools.partial(encode_conversations, template=template_of(processor)),
    )
    image_processor = processor.image_processor
    tower_config: Any = module.model.config.vision_config
    with SplitReader(source, split) as reader:
        with first_on_node():
            lengths = conversation_lengths(reader, encoder).with_images(num_image_tokens(module.model))
        pack_tokens, packs_per_step = pack_sizes(lengths, config)
        if idle := -packs_per_step % num_processes():
            logger.warning(
                f"a step has {packs_per_step} packs for {num_processes()} processes, {idle} of which are idle in its"
                " last pass; smaller training.pack_tokens or another training.global_batch_size may use them."
            )
        loader = PackedLoader(
            [Source(reader)],
            encoder,
            num_image_tokens=num_image_tokens(module.model),
            image_size=tower_config.image_size,
            padding=padding_color(image_processor.image_mean) if image_processor.do_pad else None,
            max_length=pack_tokens,
            max_document_length=config.max_length,
            global_batch=packs_per_step,
            seed=seed,
            rank=rank(),
            world_size=num_processes(),
            num_workers=config.pack_workers,
            too_long="cut",
        )
        yield PackedFeed(module, processor, loader, config)


def pack_sizes(lengths: np.ndarray, config: TrainingConfig) -> tuple[int, int]:
    """Tokens of a pack and packs of a step, so that a step has about `config.global_batch_size` conversations.

    Args:
        lengths: tokens of all conversations.
    """
    if not len(lengths):
        raise ConfigError("there is no conversation to train on; look at the training split and at training.tasks.")
    cut = np.minimum(lengths, config.max_length)
    most = float(config.pack_tokens)
    if config.micro_batch_size:
        most = min(most, config.micro_batch_size * cut.mean())
    wanted = config.global_batch_size * cut.mean()
    num_packs = math.ceil(wanted / most)
    return max(math.ceil(wanted / num_packs), int(cut.max())), num_packs


def _total_steps(loader: PackedLoader, config: TrainingConfig) -> int:
    if config.max_steps is not None:
        return config.max_steps
    whole, rest = divmod(config.epochs, 1)
    steps = sum(loader.num_steps(epoch) for epoch in range(int(whole)))
    return max(steps + (math.ceil(rest * loader.num_steps(int(whole))) if rest else 0), 1)


def _num_labels(pack: PackedBatch) -> int:
    return int(torch.count_nonzero(pack.labels != IGNORE_INDEX))
