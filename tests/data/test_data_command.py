from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from shellv_core import storage
from shellv_core.cli import main
from shellv_core.data.index import index_rows
from shellv_core.data.verification import verify
from shellv_core.storage import InputDirectory
from tests.data.photos import photo_like_jpeg
from tests.data.test_preparation import prepared, rows_folder, turns


@pytest.fixture
def source(tmp_path: Path) -> InputDirectory:
    """A small data set of 12 samples, one of them text, with lies, and one rejected row."""
    images = {f"{n}.jpg": photo_like_jpeg(n, (120 + n, 90)) for n in range(11)}
    rows: list[Any] = [
        {
            "id": f"id-{name}",
            "image": name,
            "conversations": turns(),
            "caption": "A cat sits.",
            "hallucinated_captions": [{"type": "object", "text": "A <dog> sits.", "replacement": "<dog>"}],
        }
        for name in images
    ]
    rows += [{"id": "text", "conversations": turns("Who <b>?")}, {"id": "bad", "image": "gone.jpg"}]
    llava = rows_folder(tmp_path, rows, images)
    return prepared(tmp_path / "out", llava=llava, samples_per_shard=4, max_rejected_fraction=0.1)


def test_stats_count_what_is_there(source: InputDirectory, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", source.uri, "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    train = found["splits"]["train"]
    assert (train["num_samples"], train["num_images"], train["num_unique_images"]) == (12, 11, 11)
    assert (train["num_shards"], train["num_hallucinated"], train["num_conversations"]) == (3, 11, 12)
    assert train["image_sides"] == {"0%": 120, "50%": 125, "100%": 130}
    assert sum(number for *_, number in train["histogram"]) == 12
    assert found["rejected_counts"] == {"no conversation": 1}
    assert main(["data", "stats", source.uri]) == 0
    text = capsys.readouterr().out
    assert "train: 12 samples in 3 shards" in text
    assert "no conversation: 1" in text


def test_show_prints_a_sample_and_what_of_it_is_trained(
    source: InputDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from tests.data.tiny_tokenizers import byte_level

    key = index_rows(source.fetch("index/train.parquet"))[2]["key"]
    byte_level().save_pretrained(tmp_path / "tokenizer")
    assert main(["data", "show", source.uri, "--key", key, "--tokenizer", str(tmp_path / "tokenizer")]) == 0
    text = capsys.readouterr().out
    assert f"{key}  id id-2.jpg" in text
    assert "122x90 (2.jpg)" in text
    assert "object hallucination: A <dog> sits." in text
    trained = "".join(re.findall(r"\[([^\[\]]*)\]", text.rpartition("trained on:")[2]))
    assert trained.strip().startswith("A photo.")
    assert "What" not in trained
    assert main(["data", "show", source.uri, "--key", "row-1"]) == 2
    assert "has no sample 'row-1'; did you mean 'row-" in capsys.readouterr().err
    assert main(["data", "show", source.uri, "--start", "12"]) == 2
    assert "has samples 0 to 11" in capsys.readouterr().err


def test_show_writes_a_page_with_the_images_inside(source: InputDirectory, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    assert main(["data", "show", source.uri, "--html", str(page)]) == 0
    html = page.read_text()
    assert html.count('<img src="data:image/jpeg;base64,') == 11
    assert html.count("<article>") == 12
    assert "A <mark>&lt;dog&gt;</mark> sits." in html
    assert "Who &lt;b&gt;?" in html
    assert "http" not in html.replace("</html>", "").replace(source.uri, "")


def damage(uri: str, kind: str, offset: int) -> None:
    data = bytearray(storage.read_bytes(uri))
    if kind == "flipped byte":
        data[offset + 700] ^= 1
    elif kind == "zeroed block":
        data[offset : offset + 512] = bytes(512)
    elif kind == "garbled header":
        data[offset : offset + 100] = b"\xff" * 100
    elif kind == "truncated":
        data = data[:offset]
    else:
        data += b"more"
    storage.write_bytes(uri, bytes(data))


@pytest.mark.parametrize("place", ["file", "s3"])
@pytest.mark.parametrize("kind", ["flipped byte", "zeroed block", "garbled header", "truncated", "longer"])
def test_verify_names_every_damaged_sample(
    kind: str, place: str, source: InputDirectory, capsys: pytest.CaptureFixture[str], request: pytest.FixtureRequest
) -> None:
    if place == "s3":
        uri = f"{request.getfixturevalue('bucket_uri')}/data"
        for entry in source.files():
            storage.upload(source.fetch(entry.name), f"{uri}/{entry.name}")
        storage.write_bytes(f"{uri}/manifest.json", storage.read_bytes(f"{source.uri}/manifest.json"))
        source = InputDirectory(uri)
    assert verify(source) == []
    assert main(["data", "verify", source.uri]) == 0
    assert "all as recorded" in capsys.readouterr().out
    rows = [row for row in index_rows(source.fetch("index/train.parquet")) if row["shard"] == "train/train-000001.tar"]
    damage(f"{source.uri}/train/train-000001.tar", kind, rows[2]["offset"])
    assert main(["data", "verify", source.uri]) == 1
    out = capsys.readouterr().out
    expected = {"truncated": [2, 3], "longer": []}.get(kind, [2])
    assert [row["key"] for row in rows if row["key"] in out] == [rows[number]["key"] for number in expected]
    assert "train/train-000001.tar: " in out
    assert "1 damaged" in out


def test_verify_names_a_missing_file(
    source: InputDirectory, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out" / "train" / "train-000000.tar").unlink()
    (tmp_path / "out" / "rejected.jsonl").write_text("{}")
    assert main(["data", "verify", source.uri]) == 1
    out = capsys.readouterr().out
    assert "train/train-000000.tar: missing" in out
    assert "rejected.jsonl: cut off after 2 of" in out
    assert main(["data", "stats", (tmp_path / "nothing").as_uri()]) == 1
    assert "no finished output" in capsys.readouterr().err
