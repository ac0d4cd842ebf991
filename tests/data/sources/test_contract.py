"""What holds for every format."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

from shellv_core.data.samples import Sample
from shellv_core.data.sources.base import REASONS, BadRowError
from shellv_core.data.sources.config import SourceConfig
from shellv_core.data.sources.opening import faults, open_source
from shellv_core.storage import upload
from tests.data.sources.formats import FORMATS, caption, images_named, read_all

NUM_ROWS = 23


@pytest.fixture(scope="module", params=sorted(FORMATS))
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[SourceConfig]:
    folder = tmp_path_factory.mktemp(request.param)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHELLV_HOME", str(folder / "home"))
        yield FORMATS[request.param](folder, images_named(NUM_ROWS))


def test_every_row_becomes_a_sample(made: SourceConfig) -> None:
    source = open_source(made)
    samples = read_all(source)
    assert all(isinstance(sample, Sample) for sample in samples), samples
    images = images_named(NUM_ROWS)
    by_bytes = {data: number for number, data in enumerate(images.values())}
    assert sorted(by_bytes[sample.image] for sample in samples) == list(range(NUM_ROWS))
    for position, sample in enumerate(samples):
        number = by_bytes[sample.image]
        name = list(images)[number]
        assert (sample.key, sample.source) == (f"{made.prefix}-{position:09d}", source.name)
        assert sample.image_format == ("png" if name.endswith(".png") else "jpg")
        assert (sample.width, sample.height) == (24, 16)
        assert sample.conversations[1]["value"].startswith(caption(number))
        assert sample.conversations[0]["value"].count("<image>") == 1
        assert (sample.caption or caption(number)).startswith(caption(number))
        assert Sample.from_json(sample.key, sample.to_json(), sample.image) == sample
        if made.format not in ("parquet", "webdataset"):
            assert sample.image_source == name
    assert len({sample.id for sample in samples}) == len({sample.image_source for sample in samples}) == NUM_ROWS


def test_marks_are_json_and_tell_rows_apart(made: SourceConfig) -> None:
    marks = list(open_source(made).scan())
    assert marks == list(open_source(made).scan())
    assert [json.loads(json.dumps(mark.cursor)) for mark in marks] == [mark.cursor for mark in marks]
    assert len({mark.identity for mark in marks}) == len(marks) == NUM_ROWS
    assert {len(mark.identity) for mark in marks} == {16}
    assert all(mark.stamp for mark in marks)


@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_any_cursor_begins_the_rest(made: SourceConfig, data: st.DataObject) -> None:
    source = open_source(made)
    marks = list(source.scan())
    rows = list(source.rows(marks[0].cursor))
    assert len(rows) == len(marks)
    start = data.draw(st.integers(0, len(marks) - 1))
    assert list(open_source(made).rows(marks[start].cursor)) == rows[start:]


def test_threads_read_what_one_reads(made: SourceConfig) -> None:
    source = open_source(made)
    rows = list(enumerate(source.rows(next(iter(source.scan())).cursor)))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(lambda item: source.read(item[1], item[0]), rows)) == read_all(open_source(made))


def test_a_source_is_its_settings(made: SourceConfig) -> None:
    """A worker gets the settings as JSON."""
    adapter: TypeAdapter[SourceConfig] = TypeAdapter(SourceConfig)
    assert adapter.validate_json(adapter.dump_json(made)) == pickle.loads(pickle.dumps(made)) == made


def test_the_same_from_s3(made: SourceConfig, bucket_uri: str) -> None:
    """Every address below S3; sources and image names apart, the samples are the same."""
    here = {name: value for name, value in made.model_dump().items() if isinstance(value, str) and value[0] == "/"}
    root = Path(min(here.values(), key=len)).parent
    for path in root.rglob("*"):
        if path.is_file() and "home" not in path.parts:
            upload(path, f"{bucket_uri}/{path.relative_to(root)}")
    there = made.model_copy(
        update={name: f"{bucket_uri}/{Path(value).relative_to(root)}" for name, value in here.items()}
    )
    assert faults(there, "x") == []

    def told(config: SourceConfig) -> list[tuple[object, ...]]:
        return [
            (each.key, each.id, each.conversations, each.image, each.objects) for each in read_all(open_source(config))
        ]

    assert told(there) == told(made)


def test_missing_addresses_are_all_named(made: SourceConfig, bucket_uri: str) -> None:
    assert faults(made, "x") == []
    gone = {name: f"/none/{name}.bin" for name, value in made.model_dump().items() if str(value).startswith("/")}
    found = faults(made.model_copy(update=gone), "data")
    assert len(found) == len(gone) > 0
    for fault, (name, value) in zip(found, gone.items(), strict=True):
        assert f"data.{name}={value!r}" in fault
    remote = faults(made.model_copy(update=dict.fromkeys(gone, "s3://no-such-bucket/x/y.zip")), "data")
    assert len(remote) == len(gone)
    assert len(faults(made.model_copy(update=dict.fromkeys(gone, "")), "data")) == len(gone)


def test_only_known_reasons_can_be_given() -> None:
    with pytest.raises(AssertionError):
        BadRowError("oops", "detail")
    assert all(reason and advice for reason, advice in REASONS.items())


def test_opening_imports_only_what_a_format_needs(tmp_path: Path) -> None:
    program = """
import sys
from shellv_core.data.sources import config, opening
assert not {"pyarrow", "PIL", "simplejpeg", "numpy", "boto3"} & set(sys.modules), sys.modules.keys()
"""
    subprocess.run([sys.executable, "-c", program], check=True, cwd=Path.cwd())
