"""Optimizer steps from packs that are read, decoded and tokenized ahead while the model computes."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

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
from shellv_core.training.examples import encode_answers
from shellv_core.training.features import tower_features
from shellv_core.training.loop import Part, StepData
from shellv_core.training.model import TrainingModel
from shellv_core.training.packed import PackedRow, make_row, pack_examples
from shellv_core.training.pairs import ContrastBatch, PreferenceBatch, make_contrast, make_preference
from shellv_core.training.processes import first_on_node, num_processes, rank, sums

logger = get_logger(__name__)


class _Objectives(NamedTuple):
    contrast: ContrastBatch | None = None
    preference: PreferenceBatch | None = None


class PackedFeed:
    """The steps of a loader; see `loop.Feed`."""

    def __init__(
        self, module: TrainingModel, processor: LlavaProcessor, loader: PackedLoader, config: TrainingConfig
    ) -> None:
        self.module, self.processor, self.loader, self.config = module, processor, loader, config
        self.total = _total_steps(loader, config)
        image_processor = processor.image_processor
        self._mean, self._std = list(image_processor.image_mean), list(image_processor.image_std)
        self._encode_answers = None
        if module.preference.weight:
            self._encode_answers = functools.partial(
                encode_answers,
                prompt=module.preference.prompt,
                tokenizer=processor.tokenizer,
                image_token_id=module.model.config.image_token_id,
                num_image_tokens=num_image_tokens(module.model),
                max_length=config.max_length,
                template=template_of(processor),
            )
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
        objectives = [self._objectives(pack, turn) for pack in packs]
        counts = [0 if each.contrast is None else len(each.contrast.images) for each in objectives]
        pairs = [0 if each.preference is None else each.preference.num_pairs for each in objectives]
        # An epoch's last step may have fewer packs than others, and some processes none.
        most = -(-self.loader.global_batch // self.loader.world_size)
        missing = [0] * (most - len(packs))
        own = [sum(map(_num_labels, packs)), sum(pairs)]
        num_labels, num_pairs, *totals = sums([*own, *counts, *missing, *([1] * len(packs)), *missing])
        num_parts = sum(total > 0 for total in totals[most:])
        images = sum(totals[:most])
        return StepData(
            self._parts(packs, objectives, totals[:num_parts], images, num_pairs), num_parts, int(num_labels)
        )

    def _objectives(self, pack: PackedBatch, turn: int) -> _Objectives:
        """What the contrast and the preference read of a pack; `turn` decides which hallucinated captions come now."""
        hacl, wanted = self.module.hacl, self._encode_answers is not None
        if self.module.heads is None and not wanted:
            return _Objectives()
        examples = pack_examples(pack, self.processor.tokenizer, self._encode_answers)
        images = np.arange(examples.num_images)
        contrast = preference = None
        # The padding, token 0, is cut off again.
        if self.module.heads is not None:
            contrast = make_contrast(examples, images, 0, hacl.num_hallucinated, turn, hacl.truth_weight > 0)
        if wanted:
            preference = make_preference(examples, images, self.module.model.config.image_token_id, 0, turn)
        return _Objectives(contrast, preference)

    def _parts(
        self,
        packs: list[PackedBatch],
        objectives: list[_Objectives],
        totals: list[float],
        num_images: float,
        num_pairs: float,
    ) -> Iterator[Part]:
        """Rows of the packs.

        Args:
            totals: images in contrast, of each pass in all processes.
            num_images: the same of the step.
            num_pairs: of the preference, of the step in all processes.
        """
        gather, factor = self.module.hacl.gather, num_processes()
        for number, together in enumerate(totals):
            if number >= len(packs):
                yield Part(PackedRow.idle(self.module.eos_token_id), together / max(num_images, 1) if gather else 0, 0)
                continue
            contrast, preference = objectives[number]
            own = factor * len(contrast.images) if contrast is not None else 0
            pairs = factor * preference.num_pairs if preference is not None else 0
            share = (together if gather else own) / max(num_images, 1)
            yield Part(self._row(packs[number], contrast, preference), share, pairs / max(num_pairs, 1))

    def _row(self, pack: PackedBatch, contrast: ContrastBatch | None, preference: PreferenceBatch | None) -> PackedRow:
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
            preference,
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
        ConfigError: if there is no source of shards.
        DataError: if the split has no index or cannot be encoded.
    """
    if source is None:
        raise ConfigError("training.packing=true reads shards of prepare_data; there are none here. Set it to false.")
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
