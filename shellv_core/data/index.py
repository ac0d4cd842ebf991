"""The index of a split: where every sample lies in its shards, and what it holds, without reading the shards.

One Parquet file a split, rows in the order of the shards. `Index` holds it as flat arrays: about 100 bytes a sample.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from shellv_core.errors import DataError

if TYPE_CHECKING:
    import pyarrow as pa

SPLITS = ("train", "validation")


def index_name(split: str) -> str:
    """Return for example "index/train.parquet"."""
    return f"index/{split}.parquet"


class IndexRow(NamedTuple):
    """One sample in a shard.

    Attributes:
        key: the sample's key.
        source: the file or folder that the row came from.
        row: its position there, from 0.
        image_source: what the source calls the image; "" for text.
        offset: of the sample's first tar header in the shard, in bytes.
        size: bytes from there to the next sample's first header (or the end-of-archive blocks).
        json_offset, json_size: the JSON member's content within these bytes.
        image_offset, image_size: the image member's content within these bytes; 0 for text.
        image_format: "jpg", "png" or "".
        width, height: of the image in pixels; 0 for text.
        sha256: of the `size` bytes.
        image_sha256: of the image; empty bytes for text.
        num_conversations: conversations about the image.
        num_hallucinated: hallucinated captions.
        num_words: white-space separated words in all conversations.
        num_tokens: tokens of each conversation, the image counting as one, where the data was prepared for a
            tokenizer and template; empty otherwise.
    """

    key: str
    source: str
    row: int
    image_source: str
    offset: int
    size: int
    json_offset: int
    json_size: int
    image_offset: int
    image_size: int
    image_format: str
    width: int
    height: int
    sha256: bytes
    image_sha256: bytes
    num_conversations: int
    num_hallucinated: int
    num_words: int
    num_tokens: tuple[int, ...] = ()


@dataclass(frozen=True)
class Index:
    """N samples of a split as arrays of length N, in shard order.

    Attributes:
        shards: names of the split's shards.
        shard: int32, which of `shards` the sample lies in.
        offset, size, json_offset, json_size, image_offset, image_size, width, height: int64; see `IndexRow`.
        sha256: uint8 (N, 32).
        num_conversations, num_words: int32.
    """

    shards: tuple[str, ...]
    shard: np.ndarray
    offset: np.ndarray
    size: np.ndarray
    json_offset: np.ndarray
    json_size: np.ndarray
    image_offset: np.ndarray
    image_size: np.ndarray
    width: np.ndarray
    height: np.ndarray
    sha256: np.ndarray
    num_conversations: np.ndarray
    num_words: np.ndarray

    def __len__(self) -> int:
        return len(self.shard)


def schema() -> pa.Schema:
    """The Parquet columns: those of `IndexRow`, and `shard`, the shard's name."""
    import pyarrow as pa

    text = pa.dictionary(pa.int32(), pa.string())
    return pa.schema(
        [
            pa.field("key", pa.string(), nullable=False),
            pa.field("shard", text, nullable=False),
            pa.field("source", text, nullable=False),
            pa.field("row", pa.int64(), nullable=False),
            pa.field("image_source", pa.string(), nullable=False),
            *(
                pa.field(name, pa.int64(), nullable=False)
                for name in ("offset", "size", "json_offset", "json_size", "image_offset", "image_size")
            ),
            pa.field("image_format", text, nullable=False),
            pa.field("width", pa.int32(), nullable=False),
            pa.field("height", pa.int32(), nullable=False),
            pa.field("sha256", pa.binary(32), nullable=False),
            pa.field("image_sha256", pa.binary(), nullable=False),
            pa.field("num_conversations", pa.int32(), nullable=False),
            pa.field("num_hallucinated", pa.int32(), nullable=False),
            pa.field("num_words", pa.int32(), nullable=False),
            pa.field("num_tokens", pa.list_(pa.int32()), nullable=False),
        ]
    )


def index_table(rows: Sequence[IndexRow], shard: str) -> pa.Table:
    """The rows of one shard as a table."""
    import pyarrow as pa

    columns = dict(zip(IndexRow._fields, zip(*rows, strict=True), strict=True))
    return pa.table({**columns, "shard": [shard] * len(rows)}, schema=schema())


def write_index(parts: Iterable[Path], path: Path) -> None:
    """Join the tables of shards (Parquet files, one row group each) into one file, one part in memory at a time."""
    import pyarrow.parquet as pq

    with pq.ParquetWriter(path, schema(), compression="zstd") as writer:
        for part in parts:
            writer.write_table(pq.read_table(part, schema=schema()))


def read_index(path: Path) -> Index:
    """Read an index file.

    Raises:
        DataError: if the file is not an index.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [field.name for field in fields(Index) if field.name != "shards"]
    try:
        table = pq.read_table(path, columns=names)
        shard = table.column("shard").unify_dictionaries().combine_chunks()
        arrays = {name: table.column(name).combine_chunks() for name in names if name != "shard"}
    except (pa.ArrowException, OSError, KeyError) as error:
        raise DataError(f"{path} is not an index of shards ({error}); make the data again with prepare_data.") from None
    sha256 = np.frombuffer(arrays.pop("sha256").buffers()[1], dtype=np.uint8).reshape(-1, 32)[: len(table)]
    return Index(
        shards=tuple(shard.dictionary.to_pylist()),
        shard=shard.indices.to_numpy(zero_copy_only=False).astype(np.int32),
        sha256=sha256,
        **{name: array.to_numpy(zero_copy_only=False) for name, array in arrays.items()},
    )


def index_rows(path: Path) -> list[dict[str, Any]]:
    """All rows of an index file as mappings, for people to look at; `asdict(IndexRow)` and `shard`."""
    import pyarrow.parquet as pq

    rows: list[dict[str, Any]] = pq.read_table(path).to_pylist()
    return rows
