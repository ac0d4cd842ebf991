from __future__ import annotations

import io
import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from shellv_core import storage
from shellv_core.config import build_config
from shellv_core.data.config import DataConfig
from shellv_core.data.index import index_rows
from shellv_core.data.preparation import finish, learn_captions, plan_data, write_units
from shellv_core.data.shards import read_shards
from shellv_core.errors import ConfigError, DataError
from shellv_core.storage import InputDirectory, Manifest, OutputDirectory
from tests.data.photos import photo_like_jpeg

SCENES = {"num_train": 40, "num_validation": 30, "benchmark_images": 8}


def prepared(folder: Path, /, seed: int = 0, num_workers: int = 1, **settings: Any) -> InputDirectory:
    """What the settings make of their sources, committed at `folder`."""
    config = build_config(DataConfig, settings)
    output = OutputDirectory(folder.as_uri(), "f")
    output.begin()
    work = folder.with_name(f"{folder.name}-work")
    plan = plan_data(config)
    learned = learn_captions(config, plan)
    write_units(config, seed, plan, output, work, num_workers=num_workers, learned=learned)
    details = finish(config, seed, plan, output, work).details
    output.commit(Manifest(stage="t", fingerprint="f", library_version="0", config={}, details=details))
    return InputDirectory(folder.as_uri())


def turns(question: str = "<image>\nWhat is shown?") -> list[dict[str, str]]:
    return [{"from": "human", "value": question}, {"from": "gpt", "value": "A photo."}]


def rows_folder(tmp_path: Path, rows: list[Any], images: dict[str, bytes]) -> dict[str, str]:
    """Settings of a LLaVA source with these rows and images."""
    folder = tmp_path / "images"
    folder.mkdir(exist_ok=True)
    for name, data in images.items():
        (folder / name).write_bytes(data)
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    return {"annotations": str(tmp_path / "rows.json"), "images": str(folder)}


def test_the_seed_decides_and_the_shard_size_does_not_change_samples(tmp_path: Path) -> None:
    def samples(name: str, **changes: Any) -> list[Any]:
        return list(read_shards(prepared(tmp_path / name, scenes=SCENES, **changes), "train"))

    first = samples("a")
    assert first == samples("b", samples_per_shard=7)
    assert first != samples("c", seed=1)


def test_the_number_of_workers_changes_no_byte(tmp_path: Path) -> None:
    rows = [{"id": str(n), "image": f"{n % 5}.jpg", "conversations": turns(f"<image>\n{n}?")} for n in range(90)]
    llava = rows_folder(tmp_path, rows, {f"{n}.jpg": photo_like_jpeg(n) for n in range(5)})
    settings: dict[str, Any] = {"llava": llava, "scenes": SCENES, "samples_per_shard": 10, "validation_fraction": 0.4}
    alone = prepared(tmp_path / "one", **settings)
    together = prepared(tmp_path / "three", num_workers=3, **settings)
    assert alone.files() == together.files()
    assert alone.manifest.details == together.manifest.details
    assert len(alone.files("train/")) > 9


def test_no_good_row_fails_even_where_all_may_be_bad(tmp_path: Path) -> None:
    llava = rows_folder(tmp_path, [{"id": "a"}], {})
    with pytest.raises(DataError, match="not one of 1 rows is good"):
        prepared(tmp_path / "out", llava=llava, max_rejected_fraction=1.0)


def test_a_single_reason_can_have_its_own_limit(tmp_path: Path) -> None:
    rows = [{"id": str(n), "image": f"{n}.jpg", "conversations": turns()} for n in range(10)]
    llava = rows_folder(tmp_path, rows, {f"{n}.jpg": photo_like_jpeg(n) for n in range(8)})
    limits: dict[str, Any] = {"llava": llava, "max_rejected_fraction": 0.5}
    with pytest.raises(
        DataError, match=r"2 of 10 rows.*max_rejected\[image file missing\]=0\.1.*image file missing: 2"
    ):
        prepared(tmp_path / "strict", **limits, max_rejected={"image file missing": 0.1})
    prepared(tmp_path / "lax", **limits, max_rejected={"image file missing": 0.2})
    with pytest.raises(ConfigError, match="'image file missin' is no reason; did you mean 'image file missing'"):
        build_config(DataConfig, {**limits, "max_rejected": {"image file missin": 0.1}})


def test_rows_can_be_split_and_joined_with_scenes(tmp_path: Path) -> None:
    rows = [{"id": str(n), "conversations": turns(f"Question {n}?")} for n in range(60)]
    rows += [{"id": "i", "image": "a.jpg", "conversations": turns()}] * 2
    llava = rows_folder(tmp_path, rows, {"a.jpg": photo_like_jpeg(0)})
    source = prepared(
        tmp_path / "out",
        scenes=SCENES,
        llava={name: Path(address).as_uri() for name, address in llava.items()},
        validation_fraction=0.3,
        max_rejected_fraction=0.1,
        samples_per_shard=20,
    )
    ids = {
        split: [s.id for s in read_shards(source, split) if s.source != "scenes"] for split in ("train", "validation")
    }
    assert sorted(ids["train"] + ids["validation"]) == sorted([*(str(n) for n in range(60)), "i"])
    assert 5 < len(ids["validation"]) < 35
    assert [row["reason"] for row in source.manifest.details["rejected"]] == ["duplicate row"]
    assert source.manifest.details["splits"]["train"]["num_samples"] == 40 + len(ids["train"])


def test_an_image_is_never_in_both_splits_whatever_its_name(tmp_path: Path) -> None:
    photos = [photo_like_jpeg(n) for n in range(40)]
    images = {f"{copy}-{n}.jpg": photo for n, photo in enumerate(photos) for copy in "ab"}
    rows = [{"id": name, "image": name, "conversations": turns()} for name in images]
    source = prepared(tmp_path / "out", llava=rows_folder(tmp_path, rows, images), validation_fraction=0.5)
    seen = {split: {sample.image for sample in read_shards(source, split)} for split in ("train", "validation")}
    assert not seen["train"] & seen["validation"]
    assert len(seen["train"]) + len(seen["validation"]) == 40
    assert min(map(len, seen.values())) > 8


@pytest.mark.parametrize(("deduplicate", "kept"), [("off", "aabb"), ("rows", "abb"), ("content", "ab")])
def test_duplicates_go_by_row_by_content_or_not_at_all(deduplicate: str, kept: str, tmp_path: Path) -> None:
    # The second row repeats the first; the fourth shows the third's image under another name.
    rows = [
        {"id": "a", "image": "a.jpg", "conversations": turns()},
        {"id": "a", "image": "a.jpg", "conversations": turns()},
        {"id": "b", "image": "b.jpg", "conversations": turns()},
        {"id": "b", "image": "c.jpg", "conversations": turns()},
    ]
    photo = photo_like_jpeg(1)
    llava = rows_folder(tmp_path, rows, {"a.jpg": photo_like_jpeg(0), "b.jpg": photo, "c.jpg": photo})
    source = prepared(
        tmp_path / "out", llava=llava, deduplicate=deduplicate, max_rejected_fraction=1.0, samples_per_shard=1
    )
    assert "".join(sample.id for sample in read_shards(source, "train")) == kept
    rejected = [json.loads(line) for line in source.fetch("rejected.jsonl").read_text().splitlines()]
    assert Counter(row["reason"] for row in rejected) == Counter(
        {"duplicate row": 4 - len(kept)} if kept != "aabb" else {}
    )
    assert [row["row"] for row in rejected] == [1, 3][: 4 - len(kept)]


def test_images_stay_untouched_unless_shrinking_is_asked_for(tmp_path: Path) -> None:
    from PIL import Image

    images = {"large.jpg": photo_like_jpeg(0, (640, 400)), "small.jpg": photo_like_jpeg(1, (64, 48))}
    rows = [{"id": name, "image": name, "conversations": turns()} for name in images]
    llava = rows_folder(tmp_path, rows, images)
    whole = {sample.id: sample for sample in read_shards(prepared(tmp_path / "whole", llava=llava), "train")}
    assert {name: sample.image for name, sample in whole.items()} == images
    shrunk = {
        sample.id: sample
        for sample in read_shards(prepared(tmp_path / "shrunk", llava=llava, resize_longest=320), "train")
    }
    assert shrunk["small.jpg"] == whole["small.jpg"]
    large = shrunk["large.jpg"]
    assert (large.width, large.height) == (320, 200)

    with Image.open(io.BytesIO(large.image or b"")) as image:
        assert image.size == (320, 200)


def test_the_index_tells_where_every_sample_lies_and_comes_from(tmp_path: Path) -> None:
    rows: list[Any] = [{"id": f"r{n}", "image": f"{n}.jpg", "conversations": turns()} for n in range(5)]
    rows[2]["image"] = "gone.jpg"
    llava = rows_folder(tmp_path, rows, {f"{n}.jpg": photo_like_jpeg(n, (100 + n, 80)) for n in range(5)})
    source = prepared(tmp_path / "out", llava=llava, samples_per_shard=2, max_rejected_fraction=0.5)
    found = index_rows(source.fetch("index/train.parquet"))
    assert [(row["row"], row["image_source"], row["width"], row["height"]) for row in found] == [
        (n, f"{n}.jpg", 100 + n, 80) for n in (0, 1, 3, 4)
    ]
    for row, sample in zip(found, read_shards(source, "train"), strict=True):
        assert (row["key"], row["source"]) == (sample.key, llava["annotations"])
        data = source.fetch(row["shard"]).read_bytes()
        start = row["offset"] + row["image_offset"]
        assert data[start : start + row["image_size"]] == sample.image


def test_rows_and_images_may_lie_in_an_object_store(bucket_uri: str, tmp_path: Path) -> None:
    photo = photo_like_jpeg(5)
    rows = [{"id": name, "image": name, "conversations": turns()} for name in ("sub/a.jpg", "gone.jpg")]
    storage.write_bytes(f"{bucket_uri}/in/rows.json", json.dumps(rows).encode())
    storage.write_bytes(f"{bucket_uri}/in/images/sub/a.jpg", photo)
    llava = {"annotations": f"{bucket_uri}/in/rows.json", "images": f"{bucket_uri}/in/images"}
    source = prepared(tmp_path / "out", llava=llava, max_rejected_fraction=0.5)
    assert [sample.image for sample in read_shards(source, "train")] == [photo]
    assert [row["reason"] for row in source.manifest.details["rejected"]] == ["image file missing"]
    with pytest.raises(ConfigError, match=r"llava\.annotations=.*no such object.*llava\.images=.*no-such-bucket"):
        prepared(tmp_path / "no", llava={"annotations": f"{bucket_uri}/none.json", "images": "s3://no-such-bucket/x"})


def test_units_must_all_be_written_before_the_end(tmp_path: Path) -> None:
    config = build_config(DataConfig, {"scenes": SCENES, "samples_per_shard": 10})
    output = OutputDirectory((tmp_path / "out").as_uri(), "f")
    output.begin()
    plan = plan_data(config)
    write_units(config, 0, plan, output, tmp_path / "work", plan.units[:3])
    with pytest.raises(DataError, match="4 of 7 units are not written, first number 3"):
        finish(config, 0, plan, output, tmp_path / "work")


def test_the_index_counts_the_tokens_of_a_tokenizer(tmp_path: Path) -> None:
    from shellv_core.data.lengths import conversation_lengths
    from shellv_core.data.preparation import token_encoder
    from shellv_core.data.reader import SplitReader
    from tests.data.tiny_tokenizers import byte_level

    byte_level().save_pretrained(tmp_path / "tokenizer")
    rows: list[Any] = [
        {"id": str(n), "image": "a.jpg", "conversations": [t for _ in range(1 + n % 3) for t in turns()]}
        for n in range(20)
    ]
    for row in rows:
        row["conversations"][2:] = [
            {**turn, "value": turn["value"].replace("<image>\n", "")} for turn in row["conversations"][2:]
        ]
    llava = rows_folder(tmp_path, rows, {"a.jpg": photo_like_jpeg(0)})
    tokens = {"tokenizer": str(tmp_path / "tokenizer"), "template": "v1"}
    settings: dict[str, Any] = {"llava": llava, "samples_per_shard": 6}
    counted = prepared(tmp_path / "counted", **settings, tokens=tokens)
    plain = prepared(tmp_path / "plain", **settings)
    encoder = token_encoder(build_config(DataConfig, {**settings, "tokens": tokens}).tokens)
    assert all(len(row["num_tokens"]) == 1 for row in index_rows(counted.fetch("index/train.parquet")))
    with SplitReader(counted, "train") as first, SplitReader(plain, "train") as second:
        found, expected = conversation_lengths(first, encoder), conversation_lengths(second, encoder)
    assert found.num_tokens.tolist() == expected.num_tokens.tolist()
    assert len(set(found.num_tokens.tolist())) == 3
    with pytest.raises(ConfigError, match=r"tokens\.tokenizer='.*nowhere' cannot be loaded"):
        prepared(tmp_path / "no", **settings, tokens={"tokenizer": str(tmp_path / "nowhere")})
    with pytest.raises(ConfigError, match="unknown conversation template 'v2'; did you mean 'v1'"):
        build_config(DataConfig, {**settings, "tokens": {"tokenizer": "x", "template": "v2"}})


def test_captions_get_lies_that_do_not_depend_on_the_workers(tmp_path: Path) -> None:
    colors, animals, places = ("black", "white", "brown"), ("cat", "dog", "horse"), ("table", "couch", "bench")
    captions = [
        f"A {color} {animal} is sitting on a wooden {place} next to a {other}."
        for color in colors for animal in animals for place in places for other in animals if other != animal
    ]  # fmt: skip
    rows = [
        {"id": str(n), "image": "a.jpg", "caption": caption, "conversations": turns(f"<image>\n{n}?")}
        for n, caption in enumerate(captions)
    ]
    told = {"type": "object", "text": "A cow."}
    shown = {"image": "a.jpg", "conversations": turns()}
    rows.append({"id": "told", **shown, "caption": "A cat.", "hallucinated_captions": [told]})
    rows.append({"id": "none", "image": "a.jpg", "conversations": turns("<image>\nNo caption?")})
    llava = rows_folder(tmp_path, rows, {"a.jpg": photo_like_jpeg(0)})
    settings: dict[str, Any] = {"llava": llava, "samples_per_shard": 14, "hallucination": {"rules": {"num_rounds": 20}}}
    alone = prepared(tmp_path / "one", **settings)
    together = prepared(tmp_path / "two", num_workers=2, **settings)
    assert alone.files() == together.files()
    assert alone.manifest.details == together.manifest.details
    samples = {sample.id: sample for sample in read_shards(alone, "train")}
    assert [lie.text for lie in samples["told"].hallucinated_captions] == ["A cow."]
    assert samples["none"].hallucinated_captions == ()
    made = [(captions[n], lie) for n in range(len(captions)) for lie in samples[str(n)].hallucinated_captions]
    assert len(made) > 3 * len(captions)
    assert all(lie.text != caption and lie.replacement in lie.text for caption, lie in made)
    quality = alone.manifest.details["hallucination"]
    assert quality["captions"] == len(captions)
    assert set(quality["text_only_pair_accuracy"]) == {"object", "attribute", "relation", "event"}
