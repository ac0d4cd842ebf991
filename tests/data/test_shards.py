from __future__ import annotations

import hashlib
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from shellv_core.data.samples import HallucinatedCaption, Sample, SampleObject
from shellv_core.data.shards import ShardWriter, count_samples, read_shards, shard_name, write_shard
from shellv_core.errors import DataError, IntegrityError
from shellv_core.storage import InputDirectory, Manifest, OutputDirectory
from tests.data.shard_folder import shard_folder

TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cät."}]
SAMPLES = [
    Sample("a-0", "x/1", TURNS, "test", image=b"\xff\xd8jpeg", caption="A cat.", objects=(SampleObject("cat", 2),)),
    Sample("a-1", "x/2", TURNS, "test", image=b"\x89png", image_format="png", more_conversations=(TURNS, TURNS)),
    Sample(
        "a-2",
        "x/3",
        [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}],
        "test",
        hallucinated_captions=(HallucinatedCaption("object", "A dog.", "cat", "dog"),),
    ),
]


def commit(uri: str, work: Path, shift: int = 0) -> InputDirectory:
    output = OutputDirectory(uri, "f")
    output.begin()
    shards = [
        write_shard(part, output, shard_name("train", number), work)
        for number, part in enumerate([SAMPLES[:2], SAMPLES[2:]])
    ]
    shards = [replace(shard, num_samples=shard.num_samples + shift) for shard in shards]
    details = {"splits": {"train": {"num_samples": 3, "shards": [asdict(shard) for shard in shards]}}}
    output.commit(Manifest(stage="t", fingerprint="f", library_version="0", config={}, details=details))
    return InputDirectory(uri)


def test_samples_come_back_as_they_went_in(store_uri: str, tmp_path: Path) -> None:
    source = commit(store_uri, tmp_path / "work")
    assert list(read_shards(source, "train")) == SAMPLES
    assert count_samples(source, "train") == 3
    assert not list((tmp_path / "work").iterdir())


def test_shards_are_reproducible_and_plain_webdataset_reads_them(tmp_path: Path) -> None:
    first, second = (commit((tmp_path / name).as_uri(), tmp_path / "work") for name in ("one", "two"))
    assert first.files() == second.files()
    path = tmp_path / "one" / "train" / "train-000000.tar"
    with tarfile.open(path) as tar:
        assert [(member.name, member.mtime) for member in tar] == [
            ("a-0.jpg", 0), ("a-0.json", 0), ("a-1.json", 0), ("a-1.png", 0),
        ]  # fmt: skip
    import webdataset

    found = list(webdataset.WebDataset(str(path), shardshuffle=False))
    assert [sample["__key__"] for sample in found] == ["a-0", "a-1"]
    assert found[0]["jpg"] == SAMPLES[0].image


def test_damage_is_an_error_and_never_a_loss(tmp_path: Path) -> None:
    uri = (tmp_path / "data").as_uri()
    source = commit(uri, tmp_path / "work")
    path = tmp_path / "data" / "train" / "train-000000.tar"
    whole = path.read_bytes()
    # Cut at a sample border, where webdataset itself sees nothing wrong.
    path.write_bytes(whole[:2048])
    with pytest.raises(IntegrityError, match="differs from its manifest"):
        list(read_shards(source, "train"))


def test_a_wrong_count_is_an_error(tmp_path: Path) -> None:
    source = commit((tmp_path / "data").as_uri(), tmp_path / "work", shift=1)
    with pytest.raises(DataError, match="holds 2 samples, its manifest says 3"):
        list(read_shards(source, "train"))


def test_an_index_that_counts_differently_is_an_error(tmp_path: Path) -> None:
    source = shard_folder((tmp_path / "data").as_uri(), tmp_path / "work", {"train": SAMPLES})
    assert list(read_shards(source, "train")) == SAMPLES
    source.manifest.details["splits"]["train"]["shards"][0]["num_samples"] = 4
    with pytest.raises(DataError, match="the index of 'train' has 3 samples, the manifest says 4"):
        list(read_shards(source, "train"))


def test_an_unknown_split_is_named(tmp_path: Path) -> None:
    source = commit((tmp_path / "data").as_uri(), tmp_path / "work")
    with pytest.raises(DataError, match=r"no split 'validation'; it has \['train'\]"):
        list(read_shards(source, "validation"))


def test_a_foreign_record_is_an_error() -> None:
    with pytest.raises(DataError, match="sample 'k' does not hold a record"):
        Sample.from_json("k", b"[]")
    with pytest.raises(DataError, match="has no image"):
        Sample.from_json("a-0", SAMPLES[0].to_json())


def test_the_bytes_are_those_of_webdatasets_own_writer(tmp_path: Path) -> None:
    import webdataset

    with ShardWriter(tmp_path / "ours.tar") as writer:
        for sample in SAMPLES:
            writer.write(sample)
    with webdataset.TarWriter(str(tmp_path / "theirs.tar"), encoder=False, mtime=0) as other:
        for sample in SAMPLES:
            image = {} if sample.image is None else {sample.image_format: sample.image}
            other.write({"__key__": sample.key, "json": sample.to_json(), **image})
    assert (tmp_path / "ours.tar").read_bytes() == (tmp_path / "theirs.tar").read_bytes()
    assert writer.sha256 == hashlib.sha256((tmp_path / "ours.tar").read_bytes()).hexdigest()
    with ShardWriter(tmp_path / "long.tar") as writer, pytest.raises(DataError, match="does not fit into a tar"):
        writer.write(replace(SAMPLES[0], key="k" * 99))
