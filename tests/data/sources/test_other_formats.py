"""What each format but LLaVA's has of its own: good rows and bad ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from shellv_core.data.samples import HallucinatedCaption, Sample, SampleObject
from shellv_core.data.shards import ShardWriter
from shellv_core.data.sources.config import (
    CocoSource,
    FolderSource,
    HalEvalSource,
    ParquetSource,
    TsvSource,
    WebDatasetSource,
)
from shellv_core.data.sources.opening import open_source
from shellv_core.errors import ConfigError, DataError
from tests.data.sources.formats import (
    caption,
    coco,
    images_named,
    read_all,
    reasons,
    small_image,
    turns,
    write_files,
    write_tar,
)

IMAGE = small_image(1)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    return write_files(tmp_path / "images", {"a.jpg": IMAGE, "b.jpg": small_image(2), "half.jpg": IMAGE[:200]})


def lies(**changes: Any) -> list[dict[str, Any]]:
    kinds = ("Spatial Relationship", "Objective", "Attributive", "Event")
    return [{"type": f"{kind} Hallucination", "caption": f"{kind}.", "from": "gpt-4", **changes} for kind in kinds]


def test_hal_eval_lies_have_types(images: Path, tmp_path: Path) -> None:
    rows = [
        {"image": "a.jpg", "caption": " A man. ", "hal_caption": lies()},
        {"image_path": "/data/elsewhere/b.jpg", "key": "007", "caption": "B.", "hal_caption": lies(caption=" ")},
        {"image": "a.jpg", "caption": "Event.", "hal_caption": lies()},
        {"image": "a.jpg", "caption": "A.", "hal_caption": lies(type="Other")},
        {"image": "a.jpg", "caption": "A.", "hal_caption": None},
        {"image": "a.jpg", "caption": "A.", "hal_caption": [3]},
        {"image": "a.jpg", "caption": "", "hal_caption": lies()},
        {"image": "a.jpg", "hal_caption": lies()},
        {"caption": "A.", "hal_caption": lies()},
        {"image": "half.jpg", "caption": "A.", "hal_caption": lies()},
        "text",
    ]
    (tmp_path / "hal.json").write_text(json.dumps(rows))
    source = open_source(HalEvalSource(annotations=str(tmp_path / "hal.json"), images=str(images)))
    first, second, third = read_all(source)[:3]
    kinds = ("relation", "object", "attribute", "event")
    texts = ("Spatial Relationship.", "Objective.", "Attributive.", "Event.")
    assert first.hallucinated_captions == tuple(map(HallucinatedCaption, kinds, texts))
    assert (first.caption, first.conversations[1]["value"], first.id) == ("A man.", "A man.", "0")
    assert (second.id, second.image, second.image_source, second.hallucinated_captions) == (
        "007", small_image(2), "b.jpg", ()
    )  # fmt: skip
    assert [lie.type for lie in third.hallucinated_captions] == ["relation", "object", "attribute"]
    wrong = "hallucinated captions are not [{type, text}]"
    assert reasons(source)[3:] == [
        *[wrong] * 3, "no caption", "caption is not a text", "no image", "image truncated or corrupt",
        "row is not an object",
    ]  # fmt: skip


def test_the_real_hal_eval_lists(shared: Path, tmp_path: Path) -> None:
    photo = write_files(tmp_path, {"photo.jpg": IMAGE}) / "photo.jpg"
    for split, num_images, num_lies in (("in_domain", 5000, 1200), ("out_of_domain", 4995, 1198)):
        path = shared / "benchmarks" / "hal_eval" / f"{split}_evaluation.json"
        source = open_source(HalEvalSource(annotations=str(path), images=str(tmp_path)))
        rows = list(enumerate(source.rows(0)))
        assert len({source.image_name(row) for _, row in rows}) == num_images
        assert len({mark.identity for mark in source.scan()}) == len(rows) == 5000
        # The two rows with an empty lie, and enough others.
        chosen = sorted(rows, key=lambda item: min(len(lie["caption"]) for lie in item[1]["hal_caption"]))[:300]
        for _, row in chosen:
            image = tmp_path / str(source.image_name(row))
            image.parent.mkdir(exist_ok=True)
            image.unlink(missing_ok=True)
            image.symlink_to(photo)
        samples = [source.sample(row, number) for number, row in chosen]
        assert sum(len(sample.hallucinated_captions) for sample in samples) == num_lies


def test_coco_images_have_all_captions_and_objects(tmp_path: Path) -> None:
    samples = read_all(open_source(coco(tmp_path, images_named(5))))
    assert [sample.id for sample in samples] == ["1000", "999", "998", "997", "996"]
    assert [sample.caption for sample in samples] == [f"{caption(number)} 0" for number in range(5)]
    for number, sample in enumerate(samples):
        answers = [each[1]["value"] for each in sample.more_conversations]
        assert answers == [f"{caption(number)} 1"]
        assert all(each[0]["value"].count("<image>") == 1 for each in sample.more_conversations)
    assert [sample.objects for sample in samples] == [
        (),
        (SampleObject("cat", 1),),
        (SampleObject("cat", 1), SampleObject("dog", 1)),
        (SampleObject("cat", 2), SampleObject("dog", 1)),
        (),
    ]


def captions_file(folder: Path, images: Any, annotations: Any, **more: Any) -> CocoSource:
    (folder / "c.json").write_text(json.dumps({"images": images, "annotations": annotations, **more}))
    return CocoSource(captions=str(folder / "c.json"), images=str(folder / "images"))


def test_bad_coco_images_have_reasons(images: Path, tmp_path: Path) -> None:
    names = ["a.jpg", "gone.jpg", "half.jpg", "b.jpg", None, "a.jpg", "../a.jpg"]
    listed = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    said = [{"image_id": number, "caption": "A." if number != 5 else None} for number in (0, 0, 1, 2, 4, 5, 6)]
    source = open_source(captions_file(tmp_path, listed, said))
    assert reasons(source) == [
        "", "image file missing", "image truncated or corrupt", "no caption", "no image", "caption is not a text",
        "image path leaves the image folder",
    ]  # fmt: skip
    assert read_all(source)[0].more_conversations == ()  # equal captions count once


@pytest.mark.parametrize(
    ("content", "match"),
    [
        ({"images": []}, "it has no list annotations"),
        ({"images": [{"file_name": "a"}], "annotations": []}, "images row 0 lacks id or file_name"),
        ({"images": [{"id": 1}, {"id": 1}], "annotations": []}, "images: UNIQUE constraint failed"),
        ({"images": [], "annotations": [3]}, "annotations row 0 lacks image_id or caption"),
        (
            {"images": [], "annotations": [{"image_id": 4, "caption": "A."}]},
            r"name \[4\], which 'images' does not list",
        ),
        ([], "a JSON object of lists is expected"),
    ],
)
def test_what_is_not_coco_is_said(content: Any, match: str, images: Path, tmp_path: Path) -> None:
    (tmp_path / "c.json").write_text(json.dumps(content))
    with pytest.raises(DataError, match=match):
        open_source(CocoSource(captions=str(tmp_path / "c.json"), images=str(images)))


def test_coco_instances_fit_their_categories(images: Path, tmp_path: Path) -> None:
    config = captions_file(tmp_path, [{"id": 1, "file_name": "a.jpg"}], [{"image_id": 1, "caption": "A."}])
    (tmp_path / "i.json").write_text(
        json.dumps(
            {"categories": [], "annotations": [{"image_id": 1, "category_id": 9}, {"image_id": 77, "category_id": 9}]}
        )
    )
    with pytest.raises(DataError, match=r"i\.json: annotations name \[9, 9\], which 'categories' does not list"):
        open_source(config.model_copy(update={"instances": str(tmp_path / "i.json")}))


def test_tsv_lines(images: Path, tmp_path: Path) -> None:
    lines = [
        b"A man.\ta.jpg",
        b"",
        'Ein grünes "Haus".\tb.jpg\tmore'.encode(),
        b"A man.\thttps://x.org/a.jpg",
        b"A man.\tgone.jpg",
        b"A man.",
        b"\xe9t\xe9\ta.jpg",
        b" \ta.jpg",
        b"A man.\t",
        b"An <image>.\ta.jpg",
    ]
    path = tmp_path / "rows.tsv"
    path.write_bytes(b"\xef\xbb\xbf" + b"\n".join(lines))
    source = open_source(TsvSource(annotations=str(path), images=str(images)))
    results = read_all(source)
    assert [results[0].caption, results[1].caption] == ["A man.", 'Ein grünes "Haus".']
    assert results[1].conversations[1]["value"] == 'Ein grünes "Haus".'
    assert reasons(source) == [
        "", "", "image path leaves the image folder", "image file missing", "columns missing", "row is not UTF-8",
        "no caption", "no image", "not exactly one image token",
    ]  # fmt: skip
    assert "1 columns in b'A man.'; 2 needed" in results[4].detail


def test_tsv_columns_by_position_and_name(images: Path, tmp_path: Path) -> None:
    path = tmp_path / "rows.tsv"
    path.write_text("filepath\tid\ttitle\na.jpg\t1\tA man.\n")
    by_position = TsvSource(annotations=str(path), images=str(images), header=True, caption_column=2, image_column=0)
    by_name = by_position.model_copy(update={"header": False, "caption_column": "title", "image_column": "filepath"})
    assert read_all(open_source(by_name)) == read_all(open_source(by_position))
    assert [sample.caption for sample in read_all(open_source(by_name))] == ["A man."]
    with pytest.raises(ConfigError, match=r"no column 'caption'; its first line names \['filepath', 'id', 'title'\]"):
        open_source(by_name.model_copy(update={"caption_column": "caption"}))
    path.write_bytes(b"x" * (3 << 20))
    with pytest.raises(DataError, match="no line end within 1 MiB from byte 0"):
        read_all(open_source(TsvSource(annotations=str(path), images=str(images))))


def test_folder_sidecars(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    files = {
        "a.JPG": IMAGE, "a.txt": b"A text.", "a.caption": b"not this one",
        "b.jpg": IMAGE, "b.json": json.dumps({"conversations": turns("Q", "B.")}).encode(), "b.txt": b"nor this",
        "c.jpg": IMAGE,
        "d.webp": small_image(1, "WEBP"), "d.txt": b"D.",
        "e.jpg": IMAGE, "e.json": b"[1]",
        "f.jpg": IMAGE, "f.json": b"{",
        "g.jpg": IMAGE, "g.txt": b"\xff\xfe",
        "h.jpg": IMAGE, "h.txt": b" \n",
        "i/._a.jpg": b"x", ".hidden/a.jpg": IMAGE, "notes.txt": b"alone", "README.md": b"x",
        "z/a.jpg": IMAGE, "z/a.json": json.dumps({"id": 5, "text": "Z.", "Hallucination caption": "Not Z."}).encode(),
    }  # fmt: skip
    source = open_source(FolderSource(folder=str(write_files(folder, files))))
    results = read_all(source)
    assert [result.id if isinstance(result, Sample) else result.key for result in results] == [*"abcdefgh", "5"]
    assert [results[0].caption, results[1].caption, results[8].caption] == ["A text.", None, "Z."]
    assert results[1].conversations == turns("Q", "B.")
    assert results[8].hallucinated_captions == (HallucinatedCaption("unspecified", "Not Z."),)
    assert results[8].image_source == "z/a.jpg"
    assert reasons(source) == [
        "", "", "no caption", "image format not supported", "row is not an object", "record unreadable",
        "row is not UTF-8", "no caption", "",
    ]  # fmt: skip
    (folder / "linked").symlink_to(folder, target_is_directory=True)
    (folder / "y.jpg").symlink_to(tmp_path / "nowhere")
    assert reasons(source)[8:] == ["no caption", ""]
    (folder / "y.jpg").unlink()
    before = [mark.stamp for mark in source.scan()]
    (folder / "a.txt").write_bytes(b"Another text.")
    assert [mark.stamp != stamp for mark, stamp in zip(source.scan(), before, strict=True)] == [True] + [False] * 8


def test_a_missing_folder_is_said(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        open_source(FolderSource(folder=str(tmp_path / "none")))


def write_table(path: Path, columns: dict[str, Any]) -> Path:
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)
    return path


def test_parquet_columns(images: Path, tmp_path: Path) -> None:
    path = write_table(
        tmp_path / "t.parquet",
        {
            "image": [IMAGE, IMAGE, IMAGE[:100], None, IMAGE, IMAGE, IMAGE],
            "caption": [["A.", "B.", "A."], ["C."], ["D."], ["E."], None, ["", None], ["F."]],
            "conversations": [None, turns("Q", "C?"), None, None, None, None, [{"from": "gpt", "value": "x"}]],
        },
    )
    source = open_source(ParquetSource(files=str(path)))
    first, second = read_all(source)[:2]
    assert (first.caption, first.conversations[1]["value"], first.id) == ("A.", "A.", "0")
    assert [each[1]["value"] for each in first.more_conversations] == ["B."]
    assert (second.caption, second.conversations, second.image) == ("C.", turns("Q", "C?"), IMAGE)
    assert first.image_source != second.image_source
    assert reasons(source) == [
        "", "", "image truncated or corrupt", "no image", "no caption", "caption is not a text",
        "roles do not alternate human, gpt",
    ]  # fmt: skip
    assert len({mark.identity for mark in source.scan()}) == 7
    path = write_table(tmp_path / "p.parquet", {"picture": ["a.jpg", "gone.jpg", None, "a.jpg"], "text": [*"XYZX"]})
    config = ParquetSource(files=str(path), images=str(images), image_column="picture", id_column="text")
    assert reasons(open_source(config)) == ["", "image file missing", "no image", ""]
    assert read_all(open_source(config))[0].id == "X"
    assert len({mark.identity for mark in open_source(config).scan()}) == 3  # the last row repeats the first
    with pytest.raises(DataError, match=r"'picture' holds paths; set the source's `images`"):
        read_all(open_source(config.model_copy(update={"images": None})))
    with pytest.raises(DataError, match=r"neither the column 'x' nor one of \['y'\]; it has \['picture', 'text'\]"):
        read_all(open_source(config.model_copy(update={"conversations_column": "x", "caption_columns": ("y",)})))


def test_parquet_files_of_a_hub_folder(tmp_path: Path) -> None:
    for name in ("data/train-00000-of-00002", "data/train-00001-of-00002", "data/validation-00000-of-00001"):
        write_table(tmp_path / "set" / f"{name}.parquet", {"image": [IMAGE], "text": [name]})
    with pytest.raises(DataError, match=r"several splits \(train, validation\); choose one by `pattern`"):
        open_source(ParquetSource(files=str(tmp_path / "set")))
    source = open_source(ParquetSource(files=str(tmp_path / "set"), pattern="train-*"))
    assert [sample.caption[-14:] for sample in read_all(source)] == ["00000-of-00002", "00001-of-00002"]
    with pytest.raises(DataError, match=r"holds no \.parquet or \.arrow file that matches 'test\*'"):
        open_source(ParquetSource(files=str(tmp_path / "set"), pattern="test*"))


def test_damaged_tables_are_named(tmp_path: Path) -> None:
    import pyarrow as pa

    table = pa.table({"image": [IMAGE] * 50, "text": [*"ABCDE"] * 10})
    whole = write_table(tmp_path / "w.parquet", {"image": [IMAGE] * 50, "text": [*"ABCDE"] * 10}).read_bytes()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    stream = sink.getvalue().to_pybytes()
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as writer:
        writer.write_table(table, max_chunksize=10)
    file = sink.getvalue().to_pybytes()
    for name, data in (("s.arrow", stream), ("f.arrow", file)):
        (tmp_path / name).write_bytes(data)
        assert len(read_all(open_source(ParquetSource(files=str(tmp_path / name))))) == 50
    for name, data in (
        ("cut.parquet", whole[:-100]),
        ("text.parquet", b"text"),
        ("cut.arrow", stream[:-8]),
        ("cut more.arrow", stream[: len(stream) // 2]),
        ("cut file.arrow", file[:-50]),
        ("empty.arrow", b""),
    ):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(DataError, match=rf"{name} is not a whole Parquet or Arrow file"):
            read_all(open_source(ParquetSource(files=str(tmp_path / name))))


def test_this_projects_own_shards_come_back_whole(tmp_path: Path) -> None:
    sample = Sample(
        key="k-1",
        id="first",
        conversations=turns("What?", "A cat."),
        source="elsewhere",
        image=IMAGE,
        more_conversations=(turns("And?", "A dog."),),
        tasks=("what", "and"),
        caption="A cat and a dog.",
        hallucinated_captions=(HallucinatedCaption("object", "A cow.", "cat", "cow"),),
        objects=(SampleObject("cat", 2, "red", None),),
        image_source="elsewhere/a.jpg",
    )
    text = Sample(
        key="k-2",
        id="second",
        conversations=[{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}],
        source="s",
    )
    with ShardWriter(tmp_path / "shard.tar") as writer:
        writer.write(sample)
        writer.write(text)
    source = open_source(WebDatasetSource(tars=str(tmp_path / "shard.tar"), prefix="again"))
    assert read_all(source) == [
        replace(sample, key="again-000000000", source=source.name, width=24, height=16),
        replace(text, key="again-000000001", source=source.name),
    ]


def test_bad_samples_of_tars_have_reasons(tmp_path: Path) -> None:
    good = json.dumps({"conversations": turns("Q", "A")}).encode()

    def told(**changes: Any) -> bytes:
        return json.dumps({"conversations": turns("Q", "A"), **changes}).encode()

    files = {
        "00.jpg": IMAGE, "00.txt": b"\xef\xbb\xbfA man.\n",
        "01.txt": b"No image.",
        "02.jpg": IMAGE,
        "03.jpg": IMAGE[:100], "03.txt": b"Half.",
        "04.jpg": IMAGE, "04.json": b"{",
        "05.jpg": IMAGE, "05.json": b"[]",
        "06.jpg": IMAGE, "06.png": IMAGE, "06.txt": b"Two.",
        "07.jpg": IMAGE, "07.txt": b"\xff",
        "08.webp": small_image(1, "WEBP"), "08.json": good,
        "09.json": good,
        "10.jpg": IMAGE, "10.json": told(more_conversations=[[]]),
        "11.jpg": IMAGE, "11.json": told(objects=[{"category": "cat", "count": "two"}]),
        "12.jpg": IMAGE, "12.json": told(tasks=["a", "b"]),
        "13.jpg": IMAGE, "13.json": told(id="x"),
        "14.mask.png": IMAGE, "14.jpg": IMAGE, "14.json": json.dumps({"text": "A man."}).encode(),
        ".15.jpg": IMAGE, "16": b"no suffix",
    }  # fmt: skip
    source = open_source(WebDatasetSource(tars=str(write_tar(tmp_path / "t.tar", files))))
    assert reasons(source) == [
        "", "no image", "no caption", "image truncated or corrupt", "record unreadable", "row is not an object",
        "image is not one path", "row is not UTF-8", "image format not supported", "image token without image",
        "no conversation", "record unreadable", "record unreadable", "", "",
    ]  # fmt: skip
    results = read_all(source)
    assert [results[number].id for number in (0, 13, 14)] == ["00", "x", "14"]
    assert [results[number].caption for number in (0, 13, 14)] == ["A man.", None, "A man."]
    assert results[1].key == "01"
    assert results[0].image_source == "t.tar/00.jpg"


def test_damaged_tars_are_named_and_never_shortened(tmp_path: Path) -> None:
    files = {f"{number}.{suffix}": IMAGE for number in range(4) for suffix in ("jpg", "txt")}
    data = write_tar(tmp_path / "whole.tar", files).read_bytes()
    third = data.rfind(b"3.jpg\0") // 512 * 512
    for damaged, rows in (
        (data[:third], 2),
        (data[:third] + bytes(512) + data[third + 512 :], 2),
        (data[:third] + b"x" * 512 + data[third + 512 :], 2),
        (data[: third + 600], 3),
    ):
        (tmp_path / "t").mkdir(exist_ok=True)
        (tmp_path / "t" / "cut.tar").write_bytes(damaged)
        source = open_source(WebDatasetSource(tars=str(tmp_path / "t")))
        found = []
        with pytest.raises(DataError, match=r"cut\.tar is (cut off|damaged)"):
            found.extend(source.scan())
        assert len(found) in (rows, rows - 1)
    with pytest.raises(DataError, match=r"holds no \.tar file"):
        open_source(WebDatasetSource(tars=str(tmp_path / "t"), pattern="train*"))
