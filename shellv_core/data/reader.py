"""Reads the samples of a split by its index: neighbours in one ranged request, several requests at a time.

Every sample's bytes are compared with the index's SHA-256 before anything in them is parsed. Bytes that differ or are
missing are fetched again, a bounded number of times; then an error names the shard, the sample and its place.
"""

from __future__ import annotations

import hashlib
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

import numpy as np

from shellv_core.data.index import Index, index_column, index_name, read_index
from shellv_core.data.samples import Sample
from shellv_core.errors import DataError, IntegrityError
from shellv_core.logs import get_logger
from shellv_core.storage import InputDirectory, join, open_store

logger = get_logger(__name__)

RANGE_BYTES = 8 << 20
NUM_REQUESTS = 4
REFETCHES = 2
HEADER_BYTES = 512
NAME_BYTES = 100  # of a tar header's first field
# A gap is read over where asking anew costs more than its bytes.
GAP_BYTES = 64 << 10


@dataclass
class ReadStatistics:
    """What a reader has done so far.

    Attributes:
        requests: ranges asked for, without retries.
        retries: requests repeated because they failed or their answer broke off.
        refetches: samples asked for again because their bytes were wrong or missing.
        bytes: received and kept.
        samples: verified.
    """

    requests: int = 0
    retries: int = 0
    refetches: int = 0
    bytes: int = 0
    samples: int = 0


@dataclass(frozen=True)
class _Span:
    """A range of one shard and the samples in it, as positions in the index, in the order of their offsets."""

    shard: int
    offset: int
    size: int
    ids: np.ndarray


class SplitReader:
    """Reads the samples of one split in any order. Safe to use from several threads.

    Use it as a context manager or `close` it: it owns threads.

    Args:
        source: an output of prepare_data.
        split: "train" or "validation".
        num_requests: how many ranges are fetched at a time.
        range_bytes: the most that one request asks for, a larger sample aside.

    Attributes:
        index: where the samples lie.
        statistics: requests, retries and bytes so far.

    Raises:
        DataError: if the folder has no such split or no index of it, or index and manifest differ.
    """

    def __init__(
        self,
        source: InputDirectory,
        split: str,
        num_requests: int = NUM_REQUESTS,
        range_bytes: int = RANGE_BYTES,
    ) -> None:
        self.source, self.split, self.range_bytes, self.num_requests = source, split, range_bytes, num_requests
        name = index_name(split)
        if not any(entry.name == name for entry in source.files("index/")):
            raise DataError(
                f"{source.uri} has no {name}: it is no output of prepare_data, an old one, or has no split {split!r}."
                " Make it again with prepare_data."
            )
        self.index_path = source.fetch(name)
        self.index: Index = read_index(self.index_path)
        self.statistics = ReadStatistics()
        self._check_shards()
        self._store = open_store(source.uri)
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(num_requests, thread_name_prefix="read")

    def __len__(self) -> int:
        return len(self.index)

    def __enter__(self) -> SplitReader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Let the threads go; requests that have not begun are dropped."""
        self._pool.shutdown(wait=True, cancel_futures=True)

    def read(self, ids: Sequence[int] | np.ndarray) -> list[Sample]:
        """The samples at positions `ids` of the index, in that order; repeats are read once.

        Raises:
            IntegrityError: if a sample's stored bytes are not those that the index recorded.
            StorageError: if the store does not answer.
        """
        unique, inverse = np.unique(np.asarray(ids, dtype=np.int64), return_inverse=True)
        samples: list[Sample] = []
        for chunk in self._pool.map(self._fetch, self._spans(unique)):
            samples += chunk
        return [samples[position] for position in inverse]

    def samples(self, start: int = 0) -> Iterator[Sample]:
        """All samples from position `start` on, in the order of the index, read ahead.

        Raises:
            IntegrityError, StorageError: as `read`.
        """
        spans = self._spans(np.arange(start, len(self)))
        ahead: deque[Future[list[Sample]]] = deque()
        try:
            for span in spans:
                ahead.append(self._pool.submit(self._fetch, span))
                if len(ahead) > self.num_requests:
                    yield from ahead.popleft().result()
            while ahead:
                yield from ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

    def address(self, position: int) -> str:
        """Where a sample lies, for messages: shard, key and byte range."""
        index = self.index
        key = index_column(self.index_path, "key")[position]
        offset, size = int(index.offset[position]), int(index.size[position])
        shard = join(self.source.uri, index.shards[index.shard[position]])
        return f"{shard}: sample {key!r} (bytes {offset} to {offset + size - 1})"

    def _check_shards(self) -> None:
        stored = {entry.name: entry.bytes for entry in self.source.files()}
        index = self.index
        ends = np.zeros(len(index.shards), dtype=np.int64)
        np.maximum.at(ends, index.shard, index.offset + index.size)
        forward = np.diff(index.shard) > 0
        if not (forward | ((np.diff(index.shard) == 0) & (np.diff(index.offset) > 0))).all():
            raise DataError(f"{self.index_path}: the index is not in the order of its shards; make the data again.")
        for name, end in zip(index.shards, ends, strict=True):
            if end > stored.get(name, 0):
                raise DataError(
                    f"{self.source.uri}: the index of {self.split!r} places samples up to byte {end} of {name}, which"
                    f" has {stored.get(name, 0)} bytes by the manifest. Make the data again with prepare_data."
                )

    def _spans(self, ids: np.ndarray) -> list[_Span]:
        """Ranges that cover `ids`, which rise; the index is in the order of the shards."""
        shard, start = self.index.shard[ids], self.index.offset[ids]
        end = start + self.index.size[ids]
        fresh = np.zeros(len(ids), dtype=bool)
        fresh[1:] = (shard[1:] != shard[:-1]) | (start[1:] - end[:-1] > GAP_BYTES)
        spans: list[_Span] = []
        first = 0
        for position in range(1, len(ids) + 1):
            if position == len(ids) or fresh[position] or end[position] - start[first] > self.range_bytes:
                offset = int(start[first])
                size = int(end[position - 1]) - offset
                spans.append(_Span(int(shard[first]), offset, size, ids[first:position]))
                first = position
        return spans

    def _fetch(self, span: _Span) -> list[Sample]:
        data = memoryview(self._get(span.shard, span.offset, span.size))
        samples = []
        for position in span.ids:
            begin = int(self.index.offset[position]) - span.offset
            samples.append(self._verified(int(position), data[begin : begin + int(self.index.size[position])]))
        with self._lock:
            self.statistics.samples += len(samples)
        return samples

    def _verified(self, position: int, data: memoryview) -> Sample:
        """Parse a sample once its bytes are right, after fetching them again where they are not."""
        index = self.index
        expected, size = index.sha256[position].tobytes(), int(index.size[position])
        for attempt in range(REFETCHES + 1):
            if len(data) == size and hashlib.sha256(data).digest() == expected:
                return _parse(data, index, position)
            if attempt < REFETCHES:
                with self._lock:
                    self.statistics.refetches += 1
                logger.warning(f"{self.address(position)} came damaged; asking for it again.")
                data = memoryview(self._get(int(index.shard[position]), int(index.offset[position]), size))
        found = f"only {len(data)} of {size} bytes are there" if len(data) < size else "its SHA-256 differs"
        raise IntegrityError(
            f"{self.address(position)} is damaged in store: {found}, at {REFETCHES + 1} reads. Restore the shard from a"
            f" copy (its SHA-256 is in the manifest), or delete {self.source.uri} and rerun prepare_data."
        )

    def _get(self, shard: int, offset: int, size: int) -> bytes:
        retries = 0

        def on_retry(count: int) -> None:
            nonlocal retries
            retries += count

        uri = join(self.source.uri, self.index.shards[shard])
        try:
            data = self._store.read_range(uri, offset, size, on_retry)
        finally:
            with self._lock:
                self.statistics.requests += 1
                self.statistics.retries += retries
        with self._lock:
            self.statistics.bytes += len(data)
        return data


def _parse(data: memoryview, index: Index, position: int) -> Sample:
    record, size = int(index.json_offset[position]), int(index.json_size[position])
    header = bytes(data[record - HEADER_BYTES : record - HEADER_BYTES + NAME_BYTES])
    key = header.rstrip(b"\0").decode().rpartition(".")[0]
    image = None
    if index.image_size[position]:
        begin = int(index.image_offset[position])
        image = bytes(data[begin : begin + int(index.image_size[position])])
    return Sample.from_json(key, bytes(data[record : record + size]), image)
