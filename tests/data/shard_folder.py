"""Committed folders of shards with their index, as prepare_data leaves them, for tests and benches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq

from shellv_core.data.index import index_name, index_table, write_index
from shellv_core.data.samples import Conversation, HallucinatedCaption, Sample
from shellv_core.data.shards import Shard, ShardWriter, shard_name
from shellv_core.storage import InputDirectory, Manifest, OutputDirectory
from tests.data.photos import photo_like_jpeg

# fmt: off
WORDS = [
    "a", "the", "cat", "dog", "bus", "lamp", "red", "green", "two", "on", "under", "beside", "looks", "runs", "holds",
    "street", "sky", "who", "what", "猫", "街道", "🚌",
]
# fmt: on


def shard_folder(
    uri: str,
    work: Path,
    splits: Mapping[str, Sequence[Sample]],
    samples_per_shard: int = 32,
    num_tokens: Mapping[str, tuple[int, ...]] | None = None,
) -> InputDirectory:
    """Write `splits` as shards with an index; `num_tokens` gives the index's column of that name, by key."""
    output = OutputDirectory(uri, "fingerprint")
    output.begin()
    work.mkdir(parents=True, exist_ok=True)
    details: dict[str, object] = {}
    for split, samples in splits.items():
        parts, shards, remaining = [], [], iter(samples)
        while chunk := list(islice(remaining, samples_per_shard)):
            name = shard_name(split, len(shards))
            path = work / "unfinished.tar"
            with ShardWriter(path) as writer:
                for row, sample in enumerate(chunk):
                    writer.write(sample, row, num_tokens=(num_tokens or {}).get(sample.key, ()))
            shards.append(asdict(Shard.of(output.put_file(path, name), len(chunk))))
            parts.append(work / f"part-{len(parts)}.parquet")
            pq.write_table(index_table(writer.rows, name), parts[-1])
        write_index(parts, work / "index.parquet")
        output.put_file(work / "index.parquet", index_name(split))
        details[split] = {"num_samples": len(samples), "shards": shards}
    output.commit(
        Manifest(
            stage="prepare_data",
            fingerprint="fingerprint",
            library_version="0",
            config={},
            details={"splits": details},
        )
    )
    return InputDirectory(uri)


def random_samples(count: int, seed: int = 0, prefix: str = "s", size: tuple[int, int] = (48, 32)) -> list[Sample]:
    """Samples with small pictures, every fifth without one, some with further conversations."""
    generator = np.random.default_rng(seed)
    pictures = [photo_like_jpeg(seed * 100 + number, size) for number in range(8)]
    samples = []
    for number in range(count):
        image = None if number % 5 == 4 else pictures[generator.integers(len(pictures))]
        more = tuple(_conversation(generator, image is not None) for _ in range(generator.integers(0, 3)))
        samples.append(
            Sample(
                key=f"{prefix}-{number:06d}",
                id=str(number),
                conversations=_conversation(generator, image is not None),
                source="test",
                image=image,
                more_conversations=more if image is not None else (),
                caption=_text(generator, 6),
                hallucinated_captions=(HallucinatedCaption("object", _text(generator, 6), "cat", "dog"),),
            )
        )
    return samples


def _conversation(generator: np.random.Generator, image: bool) -> Conversation:
    turns: Conversation = []
    for turn in range(int(generator.integers(1, 4))):
        question = _text(generator, int(generator.integers(2, 9)))
        turns.append({"from": "human", "value": f"<image>\n{question}" if image and not turn else question})
        turns.append({"from": "gpt", "value": _text(generator, int(generator.integers(1, 20)))})
    return turns


def _text(generator: np.random.Generator, num_words: int) -> str:
    return " ".join(WORDS[index] for index in generator.integers(len(WORDS), size=num_words))
