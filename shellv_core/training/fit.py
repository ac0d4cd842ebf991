"""From samples to a trained model: what the training stages share."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import LlavaProcessor

from shellv_core.config import fingerprint
from shellv_core.data.samples import Sample, sample_conversations
from shellv_core.data.shards import count_samples, read_shards, split_shards
from shellv_core.data.statistics import split_statistics
from shellv_core.logs import get_logger
from shellv_core.models.compose import num_image_tokens
from shellv_core.progress import Progress
from shellv_core.storage import InputDirectory
from shellv_core.templates import DEFAULT_TEMPLATE, TEMPLATES, Template, template_of
from shellv_core.training.alignment import align_words
from shellv_core.training.config import AlignmentConfig, TrainingConfig
from shellv_core.training.examples import Examples, image_bytes, tokenize_samples
from shellv_core.training.features import CachedFeatures, ImageFeatures, LiveFeatures, cached_features
from shellv_core.training.loop import TrainingSummary, train, train_from
from shellv_core.training.memory import check_memory
from shellv_core.training.model import TrainingModel
from shellv_core.training.packed_feed import packed_feed
from shellv_core.training.parts import describe_parts, learn_in_float32
from shellv_core.training.processes import alone, first_on_node, num_processes
from shellv_core.training.runtime import runtime

logger = get_logger(__name__)
#: Packed runs look for a caption in so many samples.
SAMPLES_LOOKED_AT = 1000
NO_IMAGES = torch.zeros(0, 0, 0)


@dataclass(frozen=True)
class TrainingData:
    """Samples that can be read again and again.

    Attributes:
        read: opens the samples from the start.
        identity: hash of what `read` yields.
        source, split: where packs are read from; None if there are only samples.
    """

    read: Callable[[], Iterable[Sample]]
    num_samples: int
    identity: str
    source: InputDirectory | None = None
    split: str = "train"

    @classmethod
    def of(cls, source: InputDirectory, split: str) -> TrainingData:
        """The samples of a split of a prepare_data output."""
        identity = fingerprint([shard.sha256 for shard in split_shards(source, split)])
        return cls(lambda: read_shards(source, split), count_samples(source, split), identity, source, split)


def fit(
    module: TrainingModel,
    processor: LlavaProcessor,
    data: TrainingData,
    config: TrainingConfig,
    seed: int,
    work: Path,
    log: Callable[[dict[str, float], int], None],
    description: str,
    alignment: AlignmentConfig | None = None,
    checkpoint_address: str | None = None,
) -> TrainingSummary:
    """Tokenize `data`, get its image features and train `module` on it, in place.

    Called by all processes; afterwards the module is whole in the first one. What learns is float32 from here on, what
    is frozen stays as it is.

    Args:
        alignment: align the projector with the words of the captions first; its metrics join the summary's.
        work: local folder that survives a kill.
        checkpoint_address: see `train_from`.
    """
    if torch.cuda.is_available():
        module.to("cuda")
    learn_in_float32(module)
    logger.info("%s, part by part:\n%s", description, describe_parts(module, config))
    aligned: dict[str, float] = {}
    with runtime(module.model, config):
        if alignment or not config.packing:
            with first_on_node():
                examples, features = _load(module, processor, data, config, work)
        if alignment:
            with first_on_node():
                aligned = _align(module, examples, features, alignment, seed, work / "aligned.safetensors", log)
        checkpoints = work / "checkpoints"
        if config.packing:
            with packed_feed(module, processor, data.source, data.split, config, seed) as feed:
                if not alignment and (module.heads is not None or module.preference.weight):
                    _warn_of_idle_objectives(module, *_captions_in(data))
                _check_memory(module, config, pack=feed.largest_pack())
                summary = train_from(feed, module, config, seed, checkpoints, log, description, checkpoint_address)
        else:
            _check_memory(module, config, examples)
            summary = train(module, examples, features, config, seed, checkpoints, log, description, checkpoint_address)
    return TrainingSummary(summary.num_steps, {**aligned, **summary.metrics}, summary.details)


def _check_memory(
    module: TrainingModel,
    config: TrainingConfig,
    examples: Examples | None = None,
    pack: tuple[int, int] | None = None,
) -> None:
    devices = num_processes()
    # It makes a pass of the model, which is none of those that processes make together.
    with alone():
        check_memory(module, config, examples, pack, devices, config.zero_stage or 0)


def _load(
    module: TrainingModel, processor: LlavaProcessor, data: TrainingData, config: TrainingConfig, work: Path
) -> tuple[Examples, ImageFeatures]:
    """Tokenize `data` and get its image features."""
    with Progress(data.num_samples, "tokenizing", "samples") as counter:
        examples = tokenize_samples(
            data.read(),
            processor.tokenizer,
            module.model.config.image_token_id,
            num_image_tokens(module.model),
            config.max_length,
            config.tasks,
            counter.update,
            template_of(processor),
            module.preference.prompt if module.preference.weight else None,
        )
    _warn_of_idle_objectives(module, bool(examples.captions.lengths.any()), len(examples.hallucinated) > 0)

    def images() -> Iterator[bytes]:
        return image_bytes(data.read())

    if not examples.num_images:
        return examples, CachedFeatures(NO_IMAGES)
    if config.cache_features:
        dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        return examples, cached_features(images, examples.num_images, data.identity, module.model, processor, dtype)
    return examples, LiveFeatures(images(), work / "images.bin", module.model, processor)


def _captions_in(data: TrainingData) -> tuple[bool, bool]:
    """Whether images have captions, as far as the first samples tell, and hallucinated captions."""
    has_hallucinated = data.source is not None and split_statistics(data.source, data.split).num_hallucinated > 0
    has_captions = has_hallucinated or any(
        sample.image is not None and sample.caption for sample in itertools.islice(data.read(), SAMPLES_LOOKED_AT)
    )
    return has_captions, has_hallucinated


def _warn_of_idle_objectives(module: TrainingModel, has_captions: bool, has_hallucinated: bool) -> None:
    if module.heads is not None and not has_captions:
        logger.warning("hacl.weight=%s has no effect: no image has a caption.", module.hacl.weight)
    if module.preference.weight and not has_hallucinated:
        weight = module.preference.weight
        logger.warning("preference.weight=%s has no effect: no caption has hallucinated captions.", weight)


def _align(
    module: TrainingModel,
    examples: Examples,
    features: ImageFeatures,
    alignment: AlignmentConfig,
    seed: int,
    path: Path,
    log: Callable[[dict[str, float], int], None],
) -> dict[str, float]:
    """Align the projector, or take it from `path` where an earlier try left it."""
    projector = module.model.model.multi_modal_projector
    if path.exists():
        with safe_open(path, framework="pt") as file:
            projector.load_state_dict({name: file.get_tensor(name) for name in projector.state_dict()})
            return {name: float(value) for name, value in file.metadata().items()}
    metrics = align_words(module.model, examples, features, alignment, seed, log)
    unfinished = path.with_suffix(".tmp")
    weights = {name: tensor.contiguous() for name, tensor in projector.state_dict().items()}
    save_file(weights, unfinished, metadata={name: repr(value) for name, value in metrics.items()})
    unfinished.replace(path)
    return metrics


def tokenizer_texts(samples: Iterable[Sample], template: Template = TEMPLATES[DEFAULT_TEMPLATE]) -> Iterator[str]:
    """The texts that a new tokenizer learns from, as a model will see them."""
    for sample in samples:
        for conversation in sample_conversations(sample):
            for turn in conversation:
                yield template.learned_text(turn)
        if sample.caption:
            yield sample.caption
        for item in sample.hallucinated_captions:
            yield item.text
            if item.truth:
                yield item.truth
