from __future__ import annotations

import gzip
import json
import re
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from shellv_core.data.samples import HallucinatedCaption, Sample
from shellv_core.data.sources.base import RejectedRow
from shellv_core.data.sources.checks import CAPTION_INSTRUCTIONS
from shellv_core.data.sources.config import LlavaSource
from shellv_core.data.sources.llava import LlavaRows
from shellv_core.data.sources.opening import open_source
from shellv_core.errors import DataError, ObjectNotFoundError
from shellv_core.storage import home, upload
from tests.data.photos import photo_like_jpeg
from tests.data.sources.formats import read_all, small_image, write_files

GOOD_TURNS = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": "A photo."}]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    images = tmp_path / "images"
    photo = photo_like_jpeg(1)
    files = {"sub/good.jpg": photo, "truncated.jpg": photo[: len(photo) // 2], "text.jpg": b"no image at all"}
    write_files(images, files)
    for name, kind in (("really-a.jpg", "PNG"), ("moving.jpg", "GIF")):
        Image.new("RGB", (8, 8), "red").save(images / name, kind)
    (tmp_path / "secret.jpg").write_bytes(photo)
    return images


def read(row: Any, folder: Path) -> Sample | RejectedRow:
    path = folder.parent / "rows.json"
    path.write_text(json.dumps(["x"] * 4 + [row]))
    source = LlavaRows(LlavaSource(annotations=str(path), images=str(folder)))
    result = read_all(source)[4]
    assert result.source == str(path)
    return result


def row(**changes: Any) -> dict[str, Any]:
    return {"id": "r", "image": "sub/good.jpg", "conversations": GOOD_TURNS, **changes}


def test_a_good_row_passes_untouched(folder: Path) -> None:
    sample = read(row(), folder)
    assert isinstance(sample, Sample)
    assert (sample.key, sample.id, sample.image_name) == ("row-000000004", "r", "row-000000004.jpg")
    assert sample.image_source == "sub/good.jpg"
    assert sample.image == photo_like_jpeg(1)
    assert sample.conversations == GOOD_TURNS
    assert (sample.caption, sample.hallucinated_captions, sample.more_conversations) == (None, (), ())


def test_the_format_counts_and_not_the_name(folder: Path) -> None:
    sample = read(row(image="really-a.jpg"), folder)
    assert isinstance(sample, Sample)
    assert sample.image_name == "row-000000004.png"


def test_text_only_rows_are_good(folder: Path) -> None:
    turns = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}] * 2
    sample = read({"id": 7, "conversations": turns}, folder)
    assert isinstance(sample, Sample)
    assert (sample.id, sample.image, sample.image_name, sample.image_source) == ("7", None, None, None)


def test_hacl_rows_give_captions(folder: Path) -> None:
    hacl = row(**{"text": "A man.", "Hallucination caption": "A woman.", "task_type": "pretrain"})
    del hacl["id"]
    sample = read(hacl, folder)
    assert isinstance(sample, Sample)
    assert (sample.id, sample.caption, sample.conversations) == ("4", "A man.", GOOD_TURNS)
    assert sample.hallucinated_captions == (HallucinatedCaption("unspecified", "A woman."),)
    typed = {"type": "event", "text": "B.", "original": "a", "replacement": "b"}
    sample = read(row(caption="A.", hallucinated_captions=[typed]), folder)
    assert isinstance(sample, Sample)
    assert sample.hallucinated_captions == (HallucinatedCaption("event", "B.", "a", "b"),)


def test_a_caption_alone_gets_an_instruction(folder: Path) -> None:
    asked = set()
    for number in range(60):
        sample = read({"image": "sub/good.jpg", "text": f"A man {number}."}, folder)
        assert isinstance(sample, Sample)
        question, answer = sample.conversations
        assert (question["from"], answer) == ("human", {"from": "gpt", "value": f"A man {number}."})
        assert sample == read({"image": "sub/good.jpg", "caption": f"A man {number}."}, folder)
        asked.add(question["value"].removeprefix("<image>\n"))
    assert asked == set(CAPTION_INSTRUCTIONS)


HUMAN, GPT = {"from": "human", "value": "<image>\nQ"}, {"from": "gpt", "value": "A"}


@pytest.mark.parametrize(
    ("bad", "reason", "detail"),
    [
        ("text", "row is not an object", "str 'text'"),
        (None, "row is not an object", "NoneType"),
        (row(image="gone.jpg"), "image file missing", "'gone.jpg'"),
        (row(image="sub"), "image file missing", "'sub'"),
        (row(image="truncated.jpg"), "image truncated or corrupt", "Premature end"),
        (row(image="text.jpg"), "image truncated or corrupt", "15 bytes"),
        (row(image="moving.jpg"), "image format not supported", "GIF; convert it"),
        (row(image="../secret.jpg"), "image path leaves the image folder", "'../secret.jpg'"),
        (row(image="sub/../../secret.jpg"), "image path leaves the image folder", "secret"),
        (row(image="/etc/hostname"), "image path leaves the image folder", "'/etc/hostname'"),
        (row(image="file:///etc/hostname"), "image path leaves the image folder", "file:"),
        (row(image=""), "image path leaves the image folder", "''"),
        (row(image="\ud800"), "text is not Unicode", "surrogate"),
        (row(image=["a.jpg", "b.jpg"]), "image is not one path", "one image a row"),
        (row(conversations=[]), "no conversation", r"\[\]"),
        (row(conversations=None), "no conversation", "None"),
        (row(conversations="x"), "no conversation", "x"),
        (row(conversations=None, caption=" "), "no conversation", "None"),
        (row(conversations=[GPT, HUMAN]), "roles do not alternate human, gpt", "turn 0 is from 'gpt', not 'human'"),
        (row(conversations=[HUMAN, GPT, GPT]), "roles do not alternate human, gpt", "turn 2 is from 'gpt'"),
        (row(conversations=[HUMAN, GPT, HUMAN]), "roles do not alternate human, gpt", "has no answer"),
        (row(conversations=[HUMAN, {"from": "system", "value": "x"}]), "roles do not alternate human, gpt", "system"),
        (row(conversations=[HUMAN, {"from": "gpt"}]), "turn is not {from, value}", "turn 1"),
        (row(conversations=[HUMAN, {"from": "gpt", "value": " "}]), "empty answer", "no text"),
        (row(conversations=[HUMAN, {"from": "gpt", "value": "\udc00"}]), "text is not Unicode", "surrogate"),
        (row(conversations=[{"from": "human", "value": "Q"}, GPT]), "not exactly one image token", "0 <image>"),
        (row(conversations=[HUMAN, GPT, HUMAN, GPT]), "not exactly one image token", "2 <image>"),
        (row(image=None), "image token without image", "1 <image> but no image"),
        (row(image=None, conversations=None, caption="A."), "no image", "only a caption: 'A.'"),
        (row(conversations=None, caption="An <image>."), "not exactly one image token", "in the caption"),
        (row(caption=3), "caption is not a text", "3"),
        (row(hallucinated_captions="x"), "hallucinated captions are not [{type, text}]", "x"),
        (
            row(hallucinated_captions=[{"type": "lie", "text": "x"}]),
            "hallucinated captions are not [{type, text}]",
            "lie",
        ),
        (row(hallucinated_captions=[{"type": "event"}]), "hallucinated captions are not [{type, text}]", "event"),
        (row(**{"Hallucination caption": 4}), "hallucinated captions are not [{type, text}]", "4"),
    ],
)
def test_a_bad_row_has_an_address_and_a_reason(folder: Path, bad: Any, reason: str, detail: str) -> None:
    rejected = read(bad, folder)
    assert isinstance(rejected, RejectedRow)
    assert (rejected.row, rejected.key) == (4, "r" if isinstance(bad, dict) else None)
    assert rejected.reason == reason
    assert re.search(detail, rejected.detail), rejected.detail
    named = " (id 'r')" if rejected.key else ""
    assert f"rows.json row 4{named}: {reason}: " in str(rejected)
    str(rejected).encode()


def test_equal_rows_are_duplicates_and_equal_ids_are_not(folder: Path) -> None:
    path = folder.parent / "rows.json"
    rows = [
        row(),
        row(extra=1),
        dict(reversed(row().items())),
        row(conversations=[*GOOD_TURNS, *GOOD_TURNS]),
        row(image="other.jpg"),
        row(id="s"),
        row(caption="A."),
        row(**{"Hallucination caption": "B."}),
        "text",
        None,
        row(id="\ud800"),
    ]
    path.write_text(json.dumps(rows))
    marks = list(LlavaRows(LlavaSource(annotations=str(path), images=str(folder))).scan())
    assert len({mark.identity for mark in marks[:3]}) == 1
    assert len({mark.identity for mark in marks}) == len(rows) - 2


def test_a_stamp_follows_the_image_file(folder: Path) -> None:
    path = folder.parent / "rows.json"
    path.write_text(json.dumps([row(), row(image="none.jpg"), row(image=None), 3]))
    source = LlavaRows(LlavaSource(annotations=str(path), images=str(folder)))
    before = [mark.stamp for mark in source.scan()]
    assert [bool(stamp) for stamp in before] == [True, False, False, False]
    (folder / "sub" / "good.jpg").write_bytes(small_image(1))
    assert next(iter(source.scan())).stamp != before[0]


def test_remote_and_packed_annotations_are_fetched_once(folder: Path, tmp_path: Path, bucket_uri: str) -> None:
    path = tmp_path / "rows.json.gz"
    config = LlavaSource(annotations=f"{bucket_uri}/rows.json.gz", images=str(folder))
    with pytest.raises(ObjectNotFoundError):
        open_source(config)
    for text in ("A.", "B."):
        path.write_bytes(gzip.compress(json.dumps([row(caption=text)]).encode()))
        upload(path, config.annotations)
        (sample,) = read_all(open_source(config))
        assert (sample.caption, sample.source) == (text, config.annotations)
        before = sorted((home() / "cache" / "sources").iterdir())
        assert read_all(open_source(config)) == [sample]
        assert sorted((home() / "cache" / "sources").iterdir()) == before


def test_damage_names_the_address(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_text(json.dumps([row(), row()])[:-30])
    source = open_source(LlavaSource(annotations=path.as_uri(), images=str(folder)))
    found = []
    with pytest.raises(DataError, match=rf"{re.escape(path.as_uri())} is damaged at row 1: "):
        found.extend(source.scan())
    with pytest.raises(DataError, match="damaged"):
        list(source.rows(0))
    with pytest.raises(DataError, match="is not a file"):
        open_source(LlavaSource(annotations=str(tmp_path), images=str(folder)))


def test_answers_can_be_the_captions_of_pretraining_rows(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>\nDescribe."}, {"from": "gpt", "value": " A cat. "}]
    more = [*turns, {"from": "human", "value": "And?"}, {"from": "gpt", "value": "Nothing."}]
    rows = [
        {"id": "pair", "image": "a.jpg", "conversations": turns},
        {"id": "talk", "image": "a.jpg", "conversations": more},
        {"id": "told", "image": "a.jpg", "conversations": turns, "caption": "Its own."},
        {"id": "text", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]},
    ]
    (tmp_path / "a.jpg").write_bytes(small_image(0))
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    addresses = {"annotations": str(tmp_path / "rows.json"), "images": str(tmp_path)}
    captions = {
        given: [
            sample.caption for sample in read_all(open_source(LlavaSource(**addresses, answers_are_captions=given)))
        ]
        for given in (False, True)
    }
    assert captions == {False: [None, None, "Its own.", None], True: ["A cat.", None, "Its own.", None]}
