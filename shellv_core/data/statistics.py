"""Counts of a data set, from its manifest and index alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from shellv_core.data.index import index_name
from shellv_core.storage import InputDirectory

if TYPE_CHECKING:
    import pyarrow as pa

_BUCKETS = 12
_BAR = 40


@dataclass(frozen=True)
class SplitStatistics:
    """What a split holds.

    Attributes:
        num_images, num_unique_images: samples with an image, and different ones by content.
        bytes: of the shards.
        samples_by_source: number of samples by where they came from.
        num_hallucinated: hallucinated captions.
        length_unit: "tokens" where the data was prepared for a tokenizer, else "words".
        lengths: quantiles 0, 5, 50, 95 and 100 % of the tokens a conversation (an image counts as one), or of the words
            a sample.
        histogram: (from, to, number) of these lengths.
        image_sides: quantiles 0, 50 and 100 % of the images' longer side in pixels.
    """

    num_samples: int
    num_shards: int
    bytes: int
    num_images: int
    num_unique_images: int
    num_conversations: int
    num_hallucinated: int
    samples_by_source: dict[str, int]
    length_unit: str
    lengths: dict[str, int]
    histogram: list[tuple[int, int, int]]
    image_sides: dict[str, int]


def split_statistics(source: InputDirectory, split: str) -> SplitStatistics:
    """Count a split of a prepare_data output.

    Raises:
        ObjectNotFoundError: if it has no such split.
    """
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    shards = source.manifest.details["splits"][split]["shards"]
    columns = ["source", "image_sha256", "width", "height", "num_conversations", "num_hallucinated", "num_words"]
    table = pq.read_table(source.fetch(index_name(split)), columns=[*columns, "num_tokens"])
    with_image = table.filter(pc.field("width") > 0)
    tokens = pc.list_flatten(table.column("num_tokens"))
    unit = "tokens" if len(tokens) else "words"
    lengths = _numbers(tokens) if len(tokens) else _numbers(table.column("num_words"))
    sides = np.maximum(_numbers(with_image.column("width")), _numbers(with_image.column("height")))
    by_source = pc.value_counts(table.column("source").cast("string")).to_pylist()
    return SplitStatistics(
        num_samples=len(table),
        num_shards=len(shards),
        bytes=sum(shard["bytes"] for shard in shards),
        num_images=len(with_image),
        num_unique_images=pc.count_distinct(with_image.column("image_sha256")).as_py(),
        num_conversations=pc.sum(table.column("num_conversations")).as_py() or 0,
        num_hallucinated=pc.sum(table.column("num_hallucinated")).as_py() or 0,
        samples_by_source={row["values"]: row["counts"] for row in by_source},
        length_unit=unit,
        lengths=_quantiles(lengths, (0, 5, 50, 95, 100)),
        histogram=_histogram(lengths),
        image_sides=_quantiles(sides, (0, 50, 100)),
    )


def render_statistics(source: InputDirectory) -> str:
    """The counts of all splits as text for a terminal."""
    details = source.manifest.details
    lines = [f"{source.uri}  content {source.content_sha256[:16]}"]
    for split in details["splits"]:
        found = split_statistics(source, split)
        lines += ["", f"{split}: {found.num_samples:,} samples in {found.num_shards} shards, {_size(found.bytes)}"]
        lines.append(
            f"  images         {found.num_images:,} ({found.num_unique_images:,} different),"
            f" longer side {_spread(found.image_sides)} px"
        )
        of = "conversation" if found.length_unit == "tokens" else "sample"
        lines.append(f"  conversations  {found.num_conversations:,}")
        lines.append(f"  {found.length_unit} a {of}  {_spread(found.lengths)}")
        lines.append(f"  hallucinated captions  {found.num_hallucinated:,}")
        lines += [f"  from {name}: {number:,}" for name, number in found.samples_by_source.items()]
        most = max((number for *_, number in found.histogram), default=1)
        for low, high, number in found.histogram:
            bar = "█" * round(_BAR * number / max(most, 1))
            lines.append(f"  {low:>6}-{high:<6} {found.length_unit}  {bar} {number:,}")
    rejected = details.get("rejected_counts", {})
    lines += ["", f"rejected rows: {sum(rejected.values()):,}", *(f"  {name}: {n:,}" for name, n in rejected.items())]
    return "\n".join(lines)


def statistics_record(source: InputDirectory) -> dict[str, Any]:
    """The same as JSON values."""
    details = source.manifest.details
    return {
        "uri": source.uri,
        "content_sha256": source.content_sha256,
        "splits": {split: asdict(split_statistics(source, split)) for split in details["splits"]},
        "rejected_counts": details.get("rejected_counts", {}),
    }


def _numbers(column: pa.ChunkedArray) -> np.ndarray:
    return np.asarray(column.to_numpy(), dtype=np.int64)


def _quantiles(values: np.ndarray, percents: Sequence[int]) -> dict[str, int]:
    if not len(values):
        return {}
    found = np.percentile(values, percents, method="nearest")
    return {f"{percent}%": int(value) for percent, value in zip(percents, found, strict=True)}


def _histogram(values: np.ndarray) -> list[tuple[int, int, int]]:
    if not len(values):
        return []
    edges = np.unique(np.linspace(values.min(), values.max() + 1, _BUCKETS + 1).round().astype(int))
    counts, _ = np.histogram(values, edges)
    return [
        (int(low), int(high) - 1, int(count)) for low, high, count in zip(edges[:-1], edges[1:], counts, strict=True)
    ]


def _spread(quantiles: dict[str, int]) -> str:
    return ", ".join(f"{name} {value:,}" for name, value in quantiles.items()) or "none"


def _size(number: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if number < 1024:
            return f"{number:.1f} {unit}"
        number /= 1024
    return f"{number:.1f} TiB"
