from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shellv_core.data import llava
from shellv_core.data.llava import ImageFolder, RejectedRow, iterate_json_list, read_row, row_identity, split_of
from shellv_core.data.samples import HallucinatedCaption, Sample
from shellv_core.errors import DataError
from tests.data.photos import photo_like_jpeg

GOOD_TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A photo."}]


@pytest.fixture
def folder(tmp_path: Path) -> ImageFolder:
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    photo = photo_like_jpeg(1)
    (images / "sub" / "good.jpg").write_bytes(photo)
    (images / "truncated.jpg").write_bytes(photo[: len(photo) // 2])
    (images / "text.jpg").write_text("no image at all")
    for name, kind in (("really-a.jpg", "PNG"), ("moving.jpg", "GIF")):
        buffer = io.BytesIO()
        Image.new("RGB", (8, 8), "red").save(buffer, kind)
        (images / name).write_bytes(buffer.getvalue())
    (tmp_path / "secret.jpg").write_bytes(photo)
    return ImageFolder(str(images))


def read(row: Any, folder: ImageFolder, duplicate: bool = False) -> Sample | RejectedRow:
    return read_row(row, 4, "rows.json", folder, duplicate)


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "r", "image": "sub/good.jpg", "conversations": GOOD_TURNS, **changes}


def test_a_good_row_passes_untouched(folder: ImageFolder) -> None:
    sample = read(row(), folder)
    assert isinstance(sample, Sample)
    assert (sample.key, sample.id, sample.image_name) == ("row-000000004", "r", "row-000000004.jpg")
    assert sample.image == photo_like_jpeg(1)
    assert sample.conversations == GOOD_TURNS


def test_the_format_counts_and_not_the_name(folder: ImageFolder) -> None:
    sample = read(row(image="really-a.jpg"), folder)
    assert isinstance(sample, Sample)
    assert sample.image_name == "row-000000004.png"


def test_text_only_rows_are_good(folder: ImageFolder) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}] * 2
    sample = read({"id": 7, "conversations": turns}, folder)
    assert isinstance(sample, Sample)
    assert (sample.id, sample.image, sample.image_name) == ("7", None, None)


def test_hacl_rows_give_captions(folder: ImageFolder) -> None:
    hacl = row(**{"text": "A man.", "Hallucination caption": "A woman.", "task_type": "pretrain"})
    del hacl["id"]
    sample = read(hacl, folder)
    assert isinstance(sample, Sample)
    assert (sample.id, sample.caption) == ("4", "A man.")
    assert sample.hallucinated_captions == (HallucinatedCaption("unspecified", "A woman."),)
    typed = read(row(caption="A.", hallucinated_captions=[{"type": "event", "text": "B."}]), folder)
    assert isinstance(typed, Sample)
    assert typed.hallucinated_captions == (HallucinatedCaption("event", "B."),)


HUMAN, GPT = {"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        ("text", "row is not an object", "str 'text'"),
        (None, "row is not an object", "NoneType"),
        (row(image="gone.jpg"), "image file missing", "'gone.jpg'"),
        (row(image="sub"), "image file missing", "'sub'"),
        (row(image="truncated.jpg"), "image truncated or corrupt", "truncated"),
        (row(image="text.jpg"), "image truncated or corrupt", "15 bytes"),
        (row(image="moving.jpg"), "image format not supported", "GIF; convert it"),
        (row(image="../secret.jpg"), "image path leaves the image folder", "'../secret.jpg'"),
        (row(image="sub/../../secret.jpg"), "image path leaves the image folder", "secret"),
        (row(image="/etc/hostname"), "image path leaves the image folder", "'/etc/hostname'"),
        (row(image="file:///etc/hostname"), "image path leaves the image folder", "file:"),
        (row(image=""), "image path leaves the image folder", "''"),
        (row(image=["a.jpg", "b.jpg"]), "image is not one path", "exactly one image"),
        (row(conversations=[]), "no conversation", r"\[\]"),
        (row(conversations=None), "no conversation", "None"),
        (row(conversations=[GPT, HUMAN]), "roles do not alternate human, gpt", "turn 0 is from 'gpt', not 'human'"),
        (row(conversations=[HUMAN, GPT, GPT]), "roles do not alternate human, gpt", "turn 2 is from 'gpt'"),
        (row(conversations=[HUMAN, GPT, HUMAN]), "roles do not alternate human, gpt", "has no answer"),
        (row(conversations=[HUMAN, {"from": "system", "value": "x"}]), "roles do not alternate human, gpt", "system"),
        (row(conversations=[HUMAN, {"from": "gpt"}]), r"turn is not {from, value}", "turn 1"),
        (row(conversations=[HUMAN, {"from": "gpt", "value": " "}]), "empty answer", "no text"),
        (row(conversations=[{"from": "human", "value": "Q"}, GPT]), "not exactly one image token", "0 <image>"),
        (row(conversations=[HUMAN, GPT, HUMAN, GPT]), "not exactly one image token", "2 <image>"),
        (row(image=None), "image token without image", "1 <image> but no image"),
        (row(caption=3), "caption is not a text", "3"),
        (row(hallucinated_captions=[{"type": "lie", "text": "x"}]), "hallucinated captions are not", "lie"),
    ],
)
def test_a_bad_row_has_an_address_and_a_reason(folder: ImageFolder, bad: Any, reason: str, detail: str) -> None:
    rejected = read(bad, folder)
    assert isinstance(rejected, RejectedRow)
    assert (rejected.source, rejected.row) == ("rows.json", 4)
    assert rejected.key == ("r" if isinstance(bad, dict) else None)
    assert reason in rejected.reason
    import re

    assert re.search(detail, rejected.detail), rejected.detail
    assert str(rejected).startswith("rows.json row 4")


def test_equal_rows_are_duplicates_and_equal_ids_are_not(folder: ImageFolder) -> None:
    assert row_identity(row()) == row_identity(row(extra=1))
    assert row_identity(row()) != row_identity(row(conversations=[*GOOD_TURNS, *GOOD_TURNS]))
    rejected = read(row(), folder, duplicate=True)
    assert isinstance(rejected, RejectedRow)
    assert rejected.reason == "duplicate row"


def test_json_lists_are_streamed_whatever_the_chunk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "rows.json"
    rows = [{"a": [1, {"b": "}],["}]}, 12345, 'tëxt \\ "', None, [], -1.5e3, {"c": "]"}]
    for indent in (None, 2):
        path.write_text(json.dumps(rows, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")
        for size in (1, 2, 3, 7, 1000):
            monkeypatch.setattr(llava, "_CHUNK_CHARACTERS", size)
            assert list(iterate_json_list(path)) == rows
    path.write_text("[]")
    assert list(iterate_json_list(path)) == []


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ('{"a": 1}', "a JSON list of LLaVA rows is expected"),
        ("", "a JSON list"),
        ('[{"a": 1}, {"b": ', "damaged at row 1"),
        ('[{"a": 1}', "damaged at row 0: the list has no end"),
        ('[{"a": 1}, oops]', "damaged at row 1: Expecting value"),
    ],
)
def test_a_damaged_list_is_an_error(tmp_path: Path, text: str, match: str) -> None:
    path = tmp_path / "rows.json"
    path.write_text(text)
    with pytest.raises(DataError, match=match):
        list(iterate_json_list(path))


def test_the_split_follows_the_image() -> None:
    def sample(name: str) -> Sample:
        return Sample(f"k{name}", name, GOOD_TURNS, "s", image=b"x")

    names = [f"{number}.jpg" for number in range(2000)]
    splits = [split_of(sample(name), name, 0.2) for name in names]
    assert 0.17 < splits.count("validation") / len(splits) < 0.23
    assert splits == [split_of(sample("other"), name, 0.2) for name in names]
    assert {split_of(sample(name), name, 0.0) for name in names} == {"train"}
    assert {split_of(sample(name), name, 1.0) for name in names} == {"validation"}
