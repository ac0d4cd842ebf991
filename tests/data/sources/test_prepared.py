from __future__ import annotations

from collections import Counter
from pathlib import Path

from shellv_core.data.config import ROW_SOURCES
from shellv_core.data.shards import read_shards
from tests.data.sources.formats import FORMATS, images_named
from tests.data.test_preparation import prepared


def test_a_data_set_of_all_formats_has_the_same_bytes_whoever_writes_it(tmp_path: Path) -> None:
    sources = {}
    for name in ("llava_list", "hal_eval", "coco", "tsv", "folder", "parquet", "web_dataset"):
        (tmp_path / name).mkdir()
        config = FORMATS[name](tmp_path / name, images_named(23))
        sources[config.format] = config.model_dump()
    assert set(sources) == set(ROW_SOURCES)
    settings = {**sources, "samples_per_shard": 5, "validation_fraction": 0.3}
    alone = prepared(tmp_path / "one", **settings)
    together = prepared(tmp_path / "two", num_workers=2, **settings)
    assert alone.files() == together.files()
    samples = [*read_shards(alone, "train"), *read_shards(alone, "validation")]
    assert Counter(sample.source for sample in samples) == dict.fromkeys(
        (each.get("annotations") or each.get("captions") or each.get("folder") or each.get("files") or each["tars"]
         for each in sources.values()), 23
    )  # fmt: skip
    assert set(Counter(sample.image for sample in samples).values()) == {7}
    assert len({sample.key for sample in samples}) == 7 * 23
