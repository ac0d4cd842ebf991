from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from shellv_core import storage
from shellv_core.data.index import index_rows
from shellv_core.data.reader import REFETCHES, SplitReader
from shellv_core.data.shards import read_shards
from shellv_core.errors import DataError, IntegrityError, ObjectNotFoundError, StorageUnreachableError
from shellv_core.storage import InputDirectory
from shellv_core.storage.stores import READ_ATTEMPTS
from tests.data.shard_folder import random_samples, shard_folder
from tests.storage.faulty_proxy import Faults, FaultyProxy

SAMPLES = random_samples(150, seed=1)
SHARD = "train/train-000001.tar"


@pytest.fixture
def source(store_uri: str, tmp_path: Path) -> InputDirectory:
    """150 samples in five shards, in a folder and on the S3 server."""
    return shard_folder(f"{store_uri}/data", tmp_path / "work", {"train": SAMPLES})


def test_any_samples_come_back_in_the_order_asked_for(source: InputDirectory) -> None:
    generator = np.random.default_rng(0)
    with SplitReader(source, "train", range_bytes=20_000) as reader:
        assert len(reader) == 150
        for ids in (generator.permutation(150), np.array([7, 7, 149, 0, 7]), np.array([], dtype=np.int64), range(150)):
            assert reader.read(ids) == [SAMPLES[position] for position in ids]


def test_neighbours_come_with_one_request(source: InputDirectory) -> None:
    with SplitReader(source, "train") as reader:
        reader.read([5, 3, 4, 32, 33, 100])
        assert reader.statistics.requests == 3
        assert reader.statistics.samples == 6
        assert reader.statistics.retries == reader.statistics.refetches == 0
    with SplitReader(source, "train", range_bytes=1) as reader:
        reader.read([5, 3, 4])
        assert reader.statistics.requests == 3


def test_the_stream_begins_anywhere_and_may_be_left(source: InputDirectory) -> None:
    with SplitReader(source, "train", range_bytes=10_000) as reader:
        assert list(reader.samples()) == SAMPLES
        assert list(reader.samples(start=101)) == SAMPLES[101:]
        stream = reader.samples()
        assert next(stream) == SAMPLES[0]
        stream.close()
    assert list(read_shards(source, "train")) == SAMPLES


def _flip(data: bytes, offset: int, size: int) -> bytes:
    at = offset + size // 2
    return data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :]


def _zero(data: bytes, offset: int, size: int) -> bytes:
    return data[: offset + 512] + bytes(1024) + data[offset + 1536 :]


def _garble_header(data: bytes, offset: int, size: int) -> bytes:
    return data[:offset] + b"\xaa" * 512 + data[offset + 512 :]


def _cut_at_sample(data: bytes, offset: int, size: int) -> bytes:
    return data[:offset]


def _cut_inside(data: bytes, offset: int, size: int) -> bytes:
    return data[: offset + size - 100]


@pytest.mark.parametrize("damage", [_flip, _zero, _garble_header, _cut_at_sample, _cut_inside])
def test_damage_in_store_is_named_and_never_silent(
    bucket_uri: str, tmp_path: Path, damage: Callable[[bytes, int, int], bytes]
) -> None:
    source = shard_folder(f"{bucket_uri}/data", tmp_path / "work", {"train": SAMPLES})
    row = index_rows(source.fetch("index/train.parquet"))[40]
    uri = f"{source.uri}/{SHARD}"
    whole = storage.read_bytes(uri)
    storage.write_bytes(uri, damage(whole, row["offset"], row["size"]))
    end = row["offset"] + row["size"] - 1
    place = rf"{SHARD}: sample 's-000040' \(bytes {row['offset']} to {end}\) is damaged in store"
    with SplitReader(source, "train") as reader:
        seen = []
        with pytest.raises(IntegrityError, match=place):
            seen.extend(reader.samples())
        assert [sample.key for sample in seen] == [sample.key for sample in SAMPLES[: len(seen)]]
        with pytest.raises(IntegrityError, match="rerun prepare_data"):
            reader.read(range(30, 60))
        assert reader.statistics.refetches >= REFETCHES
        # Undamaged neighbours can still be had.
        assert reader.read(range(32, 40)) == SAMPLES[32:40]
        storage.write_bytes(uri, whole)
        assert reader.read(range(30, 60)) == SAMPLES[30:60]


def test_a_missing_shard_is_named(source: InputDirectory) -> None:
    storage.open_store(source.uri).delete(f"{source.uri}/{SHARD}")
    with SplitReader(source, "train") as reader, pytest.raises(ObjectNotFoundError, match=SHARD):
        reader.read([40])


def test_an_unknown_split_is_named(source: InputDirectory) -> None:
    with pytest.raises(DataError, match="has no split 'validation'"):
        SplitReader(source, "validation")


def test_an_epoch_through_a_faulty_network_is_complete(
    bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = shard_folder(f"{bucket_uri}/data", tmp_path / "work", {"train": SAMPLES})
    source.fetch("index/train.parquet")
    faults = Faults(reset=0.05, refused=0.05, cut=0.05, stalls=3, seed=4)
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with SplitReader(source, "train", range_bytes=1) as reader:
            keys = [sample.key for sample in reader.samples()]
            assert keys == [sample.key for sample in SAMPLES]
            failures = proxy.counts["reset"] + proxy.counts["refused"] + proxy.counts["cut"]
            assert min(proxy.counts[name] for name in ("reset", "refused", "cut", "stall")) > 0
            # Counted are exactly the requests that the network spoilt: nothing is lost, nothing asked for twice.
            assert reader.statistics.retries + reader.statistics.refetches == failures
            assert reader.statistics.requests == proxy.counts["requests"] - reader.statistics.retries


@pytest.mark.parametrize(
    ("faults", "message"),
    [(Faults(cut=1), "broke off"), (Faults(refused=1), "overloaded or failing"), (Faults(reset=1), "does not answer")],
)
def test_a_network_that_always_fails_is_given_up_on(
    bucket_uri: str, monkeypatch: pytest.MonkeyPatch, faults: Faults, message: str
) -> None:
    storage.write_bytes(f"{bucket_uri}/x", b"0123456789" * 1000)
    monkeypatch.setattr("shellv_core.storage.stores.FIRST_DELAY_SECONDS", 0.001)
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        with pytest.raises(StorageUnreachableError, match=message):
            storage.read_range(f"{bucket_uri}/x", 0, 100)
        assert proxy.counts["requests"] == READ_ATTEMPTS


def test_an_answer_that_stalls_is_asked_for_again(bucket_uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    storage.write_bytes(f"{bucket_uri}/x", b"0123456789" * 1000)
    monkeypatch.setattr("shellv_core.storage.stores.READ_TIMEOUT_SECONDS", 0.3)
    retries: list[int] = []
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], Faults(stalls=2, stall_seconds=1.5, seed=3)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = storage.open_store(bucket_uri)
        for _ in range(20):
            assert store.read_range(f"{bucket_uri}/x", 0, 100, retries.append) == b"0123456789" * 10
        assert proxy.counts["stall"] == len(retries) == 2


def test_downloads_survive_a_faulty_network(bucket_uri: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    data = os.urandom(50_000)
    storage.write_bytes(f"{bucket_uri}/x", data)
    with FaultyProxy(os.environ["AWS_ENDPOINT_URL"], Faults(reset=0.1, refused=0.1, cut=0.2, seed=1)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        for _ in range(5):
            storage.download(f"{bucket_uri}/x", tmp_path / "copy")
            assert (tmp_path / "copy").read_bytes() == data
            assert storage.read_bytes(f"{bucket_uri}/x") == data
            assert storage.read_range(f"{bucket_uri}/x", 49_990, 100) == data[49_990:]
            assert storage.read_range(f"{bucket_uri}/x", 50_000, 100) == b""
        assert proxy.counts["cut"] > 0
