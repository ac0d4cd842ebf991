from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from shellv_core import storage
from shellv_core.config import apply_overrides
from shellv_core.data.config import ScenesSource
from shellv_core.data.shards import read_shards
from shellv_core.data.sources.config import LlavaSource
from shellv_core.errors import ConfigError, DataError
from shellv_core.stages.prepare_data import PrepareDataConfig, run
from shellv_core.storage import InputDirectory
from tests.data.photos import photo_like_jpeg, three_photos

SCENES = ScenesSource(num_train=40, num_validation=30, benchmark_images=8)


def turns(question: str = "<image>\nWhat is shown?") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "A photo."}]


def llava_folder(tmp_path: Path) -> LlavaSource:
    """Three photos, one truncated JPEG, one missing file, one row with its roles broken."""
    images = tmp_path / "images"
    images.mkdir()
    photos = three_photos()
    for name, data in photos.items():
        (images / name).write_bytes(data)
    first = next(iter(photos.values()))
    (images / "truncated.jpg").write_bytes(first[: len(first) * 2 // 3])
    rows: list[dict[str, Any]] = [{"id": f"good-{name}", "image": name, "conversations": turns()} for name in photos]
    rows.insert(1, {"id": "cut", "image": "truncated.jpg", "conversations": turns()})
    rows.insert(3, {"id": "gone", "image": "gone.jpg", "conversations": turns()})
    rows.append({"id": "roles", "image": next(iter(photos)), "conversations": list(reversed(turns()))})
    annotations = tmp_path / "rows.json"
    annotations.write_text(json.dumps(rows))
    return LlavaSource(annotations=str(annotations), images=str(images))


def test_scenes_make_a_complete_data_set(store_uri: str) -> None:
    config = PrepareDataConfig(output_uri=store_uri, scenes=SCENES, samples_per_shard=16)
    result = run(config)
    assert result.metrics == {"num_train_samples": 40, "num_validation_samples": 30, "num_rejected_rows": 0}
    source = InputDirectory(store_uri)
    names = {entry.name for entry in source.files()}
    assert names == {
        *(f"train/train-{number:06d}.tar" for number in range(3)),
        *(f"validation/validation-{number:06d}.tar" for number in range(2)),
        *(f"benchmarks/pope/{split}.jsonl" for split in ("random", "popular", "adversarial")),
        "benchmarks/hal_eval/scenes.json",
        "benchmarks/chair/scenes.jsonl",
        "index/train.parquet",
        "index/validation.parquet",
        "plan.json",
        "rejected.jsonl",
    }
    splits = source.manifest.details["splits"]
    entries = {entry.name: entry for entry in source.files()}
    for split, number in (("train", 40), ("validation", 30)):
        samples = list(read_shards(source, split))
        assert len(samples) == splits[split]["num_samples"] == number
        assert [sample.key for sample in samples] == [f"{split}-{index:07d}" for index in range(number)]
        assert all(len(sample.hallucinated_captions) == 4 and sample.image for sample in samples)
        for shard in splits[split]["shards"]:
            entry = entries[shard["name"]]
            assert (entry.bytes, entry.sha256) == (shard["bytes"], shard["sha256"])
    images = {sample.image_name for sample in read_shards(source, "validation")}
    for line in source.fetch("benchmarks/pope/adversarial.jsonl").read_text().splitlines():
        assert json.loads(line)["image"] in images
    again = run(config)
    assert again.reused
    assert again.details == result.details


def test_good_rows_pass_and_bad_ones_are_accounted_for(store_uri: str, tmp_path: Path) -> None:
    llava = llava_folder(tmp_path)
    result = run(PrepareDataConfig(output_uri=store_uri, llava=llava, samples_per_shard=4, max_rejected_fraction=0.5))
    source = InputDirectory(store_uri)
    samples = list(read_shards(source, "train"))
    photos = three_photos()
    assert {sample.id.removeprefix("good-"): sample.image for sample in samples} == photos
    rejected = source.manifest.details["rejected"]
    assert [(row["row"], row["key"], row["reason"]) for row in rejected] == [
        (1, "cut", "image truncated or corrupt"),
        (3, "gone", "image file missing"),
        (5, "roles", "roles do not alternate human, gpt"),
    ]
    assert {row["source"] for row in rejected} == {llava.annotations}
    assert source.manifest.details["rejected_counts"] == {
        "image file missing": 1,
        "image truncated or corrupt": 1,
        "roles do not alternate human, gpt": 1,
    }
    assert source.manifest.details["num_rows"] == {"llava": 6}
    assert result.metrics["num_rejected_rows"] == 3


def test_too_many_bad_rows_fail_and_leave_nothing(store_uri: str, tmp_path: Path) -> None:
    llava = llava_folder(tmp_path)
    with pytest.raises(DataError) as caught:
        run(PrepareDataConfig(output_uri=store_uri, llava=llava, samples_per_shard=2, max_rejected_fraction=0.4))
    message = str(caught.value)
    assert "3 of 6 rows (50.0%) are bad" in message
    assert "allowed are 40.0% (max_rejected_fraction=0.4)" in message
    assert f"{llava.annotations} row 1 (id 'cut'): image truncated or corrupt" in message
    assert storage.list_uris(store_uri) == []


def test_all_faults_of_the_settings_come_at_once_before_any_work(tmp_path: Path) -> None:
    llava = LlavaSource(annotations=str(tmp_path / "none.json"), images=str(tmp_path / "nowhere"))
    with pytest.raises(ConfigError, match=r"none\.json' is not a file.*nowhere' is not a folder"):
        run(PrepareDataConfig(output_uri=(tmp_path / "out").as_uri(), llava=llava))
    assert not (tmp_path / "out").exists()
    with pytest.raises(ConfigError, match="no data source is given"):
        apply_overrides(PrepareDataConfig(scenes=SCENES), ["scenes=null"])
    with pytest.raises(ConfigError, match=r"llava\.images is required"):
        apply_overrides(PrepareDataConfig(scenes=SCENES), ["llava.annotations=x.json"])
    with pytest.raises(ConfigError, match="must not exceed num_validation"):
        apply_overrides(PrepareDataConfig(scenes=SCENES), ["scenes.benchmark_images=31"])
    with pytest.raises(ConfigError, match="did you mean 'existence_turns'"):
        apply_overrides(PrepareDataConfig(scenes=SCENES), ["scenes.scenes.existence_turn=2"])


def test_mended_images_are_noticed(tmp_path: Path) -> None:
    llava = llava_folder(tmp_path)
    uri = (tmp_path / "out").as_uri() + "/{fingerprint}"
    first = run(PrepareDataConfig(output_uri=uri, llava=llava, max_rejected_fraction=0.5))
    assert run(PrepareDataConfig(output_uri=uri, llava=llava, max_rejected_fraction=0.5)).reused
    (tmp_path / "images" / "truncated.jpg").write_bytes(photo_like_jpeg(9))
    mended = run(PrepareDataConfig(output_uri=uri, llava=llava, max_rejected_fraction=0.5))
    assert mended.output_uri != first.output_uri
    assert mended.metrics["num_rejected_rows"] == 2
