from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from shellv_core.data.sources.config import CocoSource, LlavaSource, ParquetSource, SourceConfig, TsvSource
from tests.data.sources.formats import small_image, turns, write_files, write_tar

#: Prints how many rows there are, and by how many MB the process grew while it opened the source and passed over it.
PROGRAM = """
import resource, sys
import pyarrow.compute, pyarrow.parquet
from pydantic import TypeAdapter
from shellv_core.data.sources.config import SourceConfig
from shellv_core.data.sources.opening import open_source

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024

early = peak()
source = open_source(TypeAdapter(SourceConfig).validate_json(sys.argv[1]))
print(sum(1 for _ in source.scan()), peak() - early)
"""


def llava(folder: Path, number: int) -> SourceConfig:
    with (folder / "rows.json").open("w") as file:
        for each in range(number):
            row = {"id": each, "image": f"{each % 5}.jpg", "conversations": turns("What is it?", f"Thing {each} " * 9)}
            file.write(("," if each else "[") + json.dumps(row))
        file.write("]")
    return LlavaSource(annotations=str(folder / "rows.json"), images=str(folder / "images"))


def tsv(folder: Path, number: int) -> SourceConfig:
    (folder / "rows.tsv").write_text("".join(f"A thing {each} to see\t{each % 5}.jpg\n" for each in range(number)))
    return TsvSource(annotations=str(folder / "rows.tsv"), images=str(folder / "images"))


def coco(folder: Path, number: int) -> SourceConfig:
    with (folder / "captions.json").open("w") as file:
        file.write('{"annotations": [')
        file.write(
            ",".join(f'{{"image_id": {each % number}, "caption": "Thing {each}"}}' for each in range(2 * number))
        )
        file.write('], "images": [')
        file.write(",".join(f'{{"id": {each}, "file_name": "{each % 5}.jpg"}}' for each in range(number)))
        file.write("]}")
    return CocoSource(captions=str(folder / "captions.json"), images=str(folder / "images"))


def parquet(folder: Path, number: int) -> SourceConfig:
    import pyarrow as pa
    import pyarrow.parquet as pq

    images = pa.array([f"{each % 5}.jpg" for each in range(number)])
    table = pa.table({"image": images, "text": [f"Thing {each}" for each in range(number)]})
    pq.write_table(table, folder / "rows.parquet", row_group_size=10_000)
    write_tar(folder / "images.tar", {f"{each}.jpg": small_image(each) for each in range(5)})
    return ParquetSource(files=str(folder / "rows.parquet"), images=str(folder / "images.tar"))


@pytest.mark.parametrize(("make", "number"), [(llava, 200_000), (tsv, 200_000), (coco, 60_000), (parquet, 200_000)])
def test_memory_stays_flat_however_long_the_list(make: object, number: int, tmp_path: Path) -> None:
    write_files(tmp_path / "images", {f"{each}.jpg": small_image(each) for each in range(5)})
    config = make(tmp_path, number)
    command = [sys.executable, "-c", PROGRAM, config.model_dump_json()]
    found, grown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=Path.cwd()).stdout.split()
    assert int(found) == number
    assert float(grown) < 30
