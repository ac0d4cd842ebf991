"""A tiny prepare_data output and settings to train on it."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import shellv_core
from shellv_core.data.samples import Sample
from shellv_core.data.shards import write_shard
from shellv_core.storage import Manifest, OutputDirectory
from shellv_core.training.config import TrainingConfig
from tests.training.tiny import EFFICIENTNET, tiny_model_config, tiny_samples

MODEL = tiny_model_config(EFFICIENTNET.model_copy(update={"standardize": True}))
TRAINING = TrainingConfig(
    global_batch_size=8,
    max_steps=30,
    trainable=("projector", "language_model"),
    projector_learning_rate=1e-2,
    language_model_learning_rate=1e-2,
    max_length=256,
    checkpoint_every_steps=10,
)


def write_data(uri: str, samples: Sequence[Sample] | None = None) -> None:
    """Commit a training split at `uri`, as prepare_data does."""
    output = OutputDirectory(uri, "0" * 64)
    output.begin()
    with tempfile.TemporaryDirectory() as work:
        shard = write_shard(
            tiny_samples() if samples is None else samples, output, "train/train-000000.tar", Path(work)
        )
    output.commit(
        Manifest(
            stage="prepare_data",
            fingerprint="0" * 64,
            library_version=shellv_core.__version__,
            config={},
            details={"splits": {"train": {"num_samples": shard.num_samples, "shards": [asdict(shard)]}}},
        )
    )
