"""The same few rows written in every format, good and odd names among them."""

from __future__ import annotations

import io
import json
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

from PIL import Image

from shellv_core.data.sources.base import RejectedRow, Source
from shellv_core.data.sources.config import (
    CocoSource,
    FolderSource,
    HalEvalSource,
    LlavaSource,
    ParquetSource,
    SourceConfig,
    TsvSource,
    WebDatasetSource,
)

NAMES = ("plain.jpg", "with space.jpg", "sub/ünï cödé.jpg", "sub/猫 🐈.png", "sub/deep/a.b-c.jpeg", "#1?%20&.jpg")


@cache
def small_image(number: int, kind: str = "JPEG") -> bytes:
    """An image that differs for every number."""
    buffer = io.BytesIO()
    color = (number * 37 % 256, number * 91 % 256, number * 53 % 256)
    image = Image.new("RGB", (24, 16), color)
    image.putpixel((0, 0), (number % 256, number // 256 % 256, 0))
    image.save(buffer, kind)
    return buffer.getvalue()


def image_of(name: str, number: int) -> bytes:
    return small_image(number, "PNG" if name.endswith(".png") else "JPEG")


def images_named(number: int) -> dict[str, bytes]:
    """Name -> bytes of `number` images, the odd names first."""
    names = [*NAMES, *(f"more/{each:05d}.jpg" for each in range(number - len(NAMES)))][:number]
    return {name: image_of(name, each) for each, name in enumerate(names)}


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    for name, data in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    return folder


def write_zip(path: Path, files: Mapping[str, bytes], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return path


def write_tar(path: Path, files: Mapping[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return path


def caption(number: int) -> str:
    return f"A picture of {number} things, größer 猫."


def turns(question: str, answer: str) -> list[dict[str, str]]:
    return [{"from": "human", "value": f"<image>\n{question}"}, {"from": "gpt", "value": answer}]


def llava_rows(names: list[str]) -> list[dict[str, Any]]:
    return [
        {"id": f"id-{number}", "image": name, "conversations": turns("What is it? 🐈", caption(number))}
        for number, name in enumerate(names)
    ]


def llava_list(folder: Path, images: dict[str, bytes]) -> SourceConfig:
    rows = json.dumps(llava_rows(list(images)), ensure_ascii=False, indent=1)
    (folder / "rows.json").write_text(rows, encoding="utf-8-sig")
    write_files(folder / "images", images)
    return LlavaSource(annotations=str(folder / "rows.json"), images=str(folder / "images"))


def llava_lines(folder: Path, images: dict[str, bytes]) -> SourceConfig:
    lines = [json.dumps(row, ensure_ascii=False) for row in llava_rows(list(images))]
    (folder / "rows.jsonl").write_text("\n".join(lines), encoding="utf-8")
    write_zip(folder / "images.zip", {f"top/{name}": data for name, data in images.items()})
    return LlavaSource(annotations=str(folder / "rows.jsonl"), images=str(folder / "images.zip/top"))


def hal_eval(folder: Path, images: dict[str, bytes]) -> SourceConfig:
    from shellv_core.data.sources.hal_eval import TYPES

    rows = [
        {
            "image": name,
            "caption": f"{caption(number)} ",
            "hal_caption": [{"type": kind, "caption": f"No {kind}", "from": "gpt-4"} for kind in TYPES],
        }
        for number, name in enumerate(images)
    ]
    (folder / "hal.json").write_text(json.dumps(rows))
    write_tar(folder / "images.tar", {f"./{name}": data for name, data in images.items()})
    return HalEvalSource(annotations=str(folder / "hal.json"), images=str(folder / "images.tar"))


def coco(folder: Path, images: dict[str, bytes]) -> SourceConfig:
    listed = [{"id": 1000 - number, "file_name": name, "width": 1} for number, name in enumerate(images)]
    sayings = [
        {"id": 7 * number + part, "image_id": 1000 - number, "caption": f"{caption(number)} {part}"}
        for part in range(2)
        for number in range(len(images))
    ]
    things = [
        {"image_id": 1000 - number, "category_id": 1 + part % 2, "segmentation": [[0.5, 1e3]], "iscrowd": 0}
        for number in range(len(images))
        for part in range(number % 4)
    ]
    (folder / "captions.json").write_text(
        json.dumps({"info": {"a": [1]}, "annotations": sayings, "images": listed, "licenses": []})
    )
    (folder / "instances.json").write_text(
        json.dumps({"annotations": things, "categories": [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]})
    )
    write_files(folder / "images", images)
    return CocoSource(
        captions=str(folder / "captions.json"),
        instances=str(folder / "instances.json"),
        images=str(folder / "images"),
    )


def tsv(folder: Path, images: dict[str, bytes]) -> SourceConfig:
    lines = [f"{name}\t{caption(number)}\textra" for number, name in enumerate(images)]
    (folder / "rows.tsv").write_text("file\ttitle\tmore\n" + "\r\n".join(lines), encoding="utf-8-sig", newline="")
    write_files(folder / "images", images)
    return TsvSource(
        annotations=str(folder / "rows.tsv"),
        images=str(folder / "images"),
        caption_column="title",
        image_column="file",
    )


def folder(folder: Path, images: dict[str, bytes]) -> SourceConfig:
    write_files(folder / "folder", images)
    for number, name in enumerate(images):
        image = folder / "folder" / name
        if number % 3 == 0:
            image.with_suffix(".json").write_text(json.dumps({"id": f"j{number}", "text": caption(number)}))
        else:
            image.with_suffix((".txt", ".caption")[number % 2]).write_text(f"{caption(number)}\n", encoding="utf-8-sig")
    return FolderSource(folder=str(folder / "folder"))


def parquet(folder: Path, images: dict[str, bytes]) -> SourceConfig:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"id": number, "image": {"bytes": data, "path": "image.jpg"}, "text": caption(number)}
        for number, data in enumerate(images.values())
    ]
    (folder / "table").mkdir()
    half = -(-len(rows) // 2)
    for part, few in enumerate((rows[:half], rows[half:])):
        if few:
            table = pa.Table.from_pylist(few)
            pq.write_table(table, folder / "table" / f"train-{part:05d}-of-00002.parquet", row_group_size=3)
    return ParquetSource(files=str(folder / "table"))


def arrow(folder: Path, images: dict[str, bytes]) -> SourceConfig:
    """What `datasets.save_to_disk` writes, images by path."""
    import pyarrow as pa

    rows = [
        {
            "image": {"bytes": None, "path": name},
            "caption": [caption(number), f"Other {number}."],
            "conversations": json.dumps(turns("Name it.", caption(number))) if number % 2 else None,
        }
        for number, name in enumerate(images)
    ]
    write_files(folder / "images", images)
    (folder / "set").mkdir()
    kinds = {"bytes": pa.binary(), "path": pa.string()}
    schema = pa.schema(
        {"image": pa.struct(kinds.items()), "caption": pa.list_(pa.string()), "conversations": pa.string()}.items()
    )
    table = pa.Table.from_pylist(rows, schema=schema)
    with pa.ipc.new_stream(str(folder / "set" / "data-00000-of-00001.arrow"), schema) as writer:
        writer.write_table(table, max_chunksize=4)
    (folder / "set" / "state.json").write_text("{}")
    (folder / "set" / "cache-1234.arrow").write_bytes(b"indices")
    return ParquetSource(files=str(folder / "set"), images=str(folder / "images"))


def web_dataset(folder: Path, images: dict[str, bytes]) -> SourceConfig:
    (folder / "tars").mkdir()
    items = list(images.items())
    for part in range(0, len(items), 4):
        files: dict[str, bytes] = {"README": b"not a sample"}
        for number, (name, data) in enumerate(items[part : part + 4], part):
            key = f"shard/{number:09d}"
            files[f"{key}.{name.rpartition('.')[2].upper()}"] = data
            files[f"{key}.cls"] = b"3"
            if number % 2:
                files[f"{key}.txt"] = caption(number).encode()
            files[f"{key}.json"] = json.dumps({"caption": caption(number), "url": "x", "status": "success"}).encode()
        write_tar(folder / "tars" / f"{part:05d}.tar", files)
    return WebDatasetSource(tars=str(folder / "tars"))


FORMATS: dict[str, Callable[[Path, dict[str, bytes]], SourceConfig]] = {
    each.__name__: each for each in (llava_list, llava_lines, hal_eval, coco, tsv, folder, parquet, arrow, web_dataset)
}


def read_all(source: Source) -> list[Any]:
    """All samples and rejected rows, read as a stage does."""
    marks = list(source.scan())
    if not marks:
        return []
    results = [source.read(row, number) for number, row in enumerate(source.rows(marks[0].cursor))]
    assert len(results) == len(marks)
    return results


def reasons(source: Source) -> list[str]:
    """The reason of each row, "" for a good one."""
    return [result.reason if isinstance(result, RejectedRow) else "" for result in read_all(source)]
