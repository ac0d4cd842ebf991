from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from shellv_core.data.sources import json_rows
from shellv_core.data.sources.blobs import local_copy
from shellv_core.data.sources.json_rows import iterate_lists, iterate_rows
from shellv_core.errors import DataError, ObjectNotFoundError

ROWS = [{"a": [1, {"b": "}],["}]}, 12345, 'tëxt \\ " 猫🐈', None, [], -1.5e3, {"c": "]"}, True]
OBJECTS = [{"a": "}\n{"}, {}, {"猫": [1, {"x": None}]}]


def lines(rows: list[Any], separator: str) -> str:
    return separator.join(json.dumps(row, ensure_ascii=False) for row in rows)


FILES = {
    "list": (json.dumps(ROWS, ensure_ascii=False), ROWS),
    "indented": (json.dumps(ROWS, indent=2, ensure_ascii=False) + "\n", ROWS),
    "spread": ("\n \r\n[\n\n" + lines(ROWS, "\t,\r\n") + "\n]\n\n", ROWS),
    "empty": (" [ ] ", []),
    "json lines": (lines(OBJECTS, "\n"), OBJECTS),
    "json lines, ended": (lines(OBJECTS, "\r\n") + "\n\n", OBJECTS),
    "joined objects": (json.dumps(OBJECTS[0], indent=1) + json.dumps(OBJECTS[1], indent=1), OBJECTS[:2]),
}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
@pytest.mark.parametrize("kind", FILES)
def test_rows_and_their_places_whatever_the_chunk(
    kind: str, encoding: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text, rows = FILES[kind]
    path = tmp_path / "rows.json"
    path.write_text(text, encoding=encoding, newline="")
    for size in (1, 2, 3, 7, 1000):
        monkeypatch.setattr(json_rows, "_CHUNK_BYTES", size)
        found = list(iterate_rows(path))
        assert [row for _, row in found] == rows
        data = path.read_bytes()
        for number, (offset, row) in enumerate(found):
            assert data[offset:].startswith(json.dumps(row, ensure_ascii=False).encode()[:1])
            assert list(iterate_rows(path, offset, number)) == found[number:]


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(JSON, max_size=8), indent=st.sampled_from([None, 0, 2]), ascii=st.booleans(), size=st.integers(1, 40)
)
def test_any_list_comes_back(
    rows: list[Any], indent: int | None, ascii: bool, size: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = json.dumps(rows, indent=indent, ensure_ascii=ascii)
    path = tmp_path_factory.mktemp("any") / "rows.json"
    path.write_bytes(text.encode("utf-8", "surrogatepass") if ascii else text.encode("utf-8", "replace"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_rows, "_CHUNK_BYTES", size)
        assert [row for _, row in iterate_rows(path)] == json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize(
    ("data", "match"),
    [
        (b"", r"begins with ''; a JSON list of rows or one JSON object a line is expected"),
        (b"caption\timage", "begins with 'caption"),
        (b"\xff\xfe[\x00]\x00", "is damaged at byte 0: it is not UTF-8"),
        (b'[{"a": 1}, {"b": ', "damaged at row 1: Expecting value at byte 17"),
        (b'[{"a": 1}, {"b": "some te', "damaged at row 1: Unterminated string"),
        (b'[{"a": 1}', "damaged at row 1: the list has no end"),
        (b'[{"a": 1}, 12', "damaged at row 1: the list has no end"),
        ('["猫", oops]'.encode(), "damaged at row 1: Expecting value at byte 8"),
        (b'[{"a": 1}, {"b": "\xff"}]', "damaged at .*not UTF-8"),
        (b'[{"a": 1}]\n[{"b": 2}]', r"goes on with '\[\{\"b\": 2\}\]' behind its list's end"),
        (b'{"a": 1}\n{"b": 2', "damaged at row 1"),
        (b'{"a": 1}\n]', "damaged at row 1"),
        (b"[" * 100_000, "nested too deeply"),
    ],
)
def test_a_damaged_file_is_an_error(data: bytes, match: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.json"
    path.write_bytes(data)
    with pytest.raises(DataError, match=match):
        list(iterate_rows(path))
    with pytest.raises(DataError, match=r"rows is damaged|rows begins|rows goes"):
        list(iterate_rows(path, name="rows"))


def test_a_row_without_end_does_not_fill_the_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(json_rows, "_MAX_ROW_BYTES", 1 << 22)
    path = tmp_path / "rows.json"
    path.write_bytes(b'["never ending' + b" text" * 4_000_000)
    tracemalloc.start()
    try:
        with pytest.raises(DataError, match=r"row 0: Unterminated string .* longer than"):
            list(iterate_rows(path))
        assert tracemalloc.get_traced_memory()[1] < 40e6
    finally:
        tracemalloc.stop()


def test_lists_of_an_object_are_passed_over_in_turn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "coco.json"
    path.write_text(json.dumps({"info": {"x": [1]}, "a": [1, [2]], "n": 12, "b": [{"猫": "]"}], "c": []}, indent=1))
    for size in (1, 5, 1000):
        monkeypatch.setattr(json_rows, "_CHUNK_BYTES", size)
        seen: dict[str, list[Any]] = {}

        def handle(key: str, elements: Iterator[Any], seen: dict[str, list[Any]] = seen) -> bool:
            seen[key] = list(elements) if key != "a" else [next(elements)]
            return key != "b"

        iterate_lists(path, handle)
        assert seen == {"a": [1], "b": [{"猫": "]"}]}
    for text, match in (
        ("[1]", "a JSON object of lists is expected"),
        ('{"a": [1, 2', "damaged at row 1 of 'a': the list has no end"),
        ('{"a": [1]', "damaged at the object's next key"),
        ('{"a" [1]}', "a key and a colon are expected"),
    ):
        path.write_text(text)
        with pytest.raises(DataError, match=match):
            iterate_lists(path, lambda key, elements: True)


def test_packed_files_are_unpacked_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    packed = tmp_path / "rows.json.gz"
    packed.write_bytes(gzip.compress(b"[1, 2]"))
    copy = local_copy(str(packed))
    assert copy.read_bytes() == b"[1, 2]"
    before = copy.stat().st_mtime_ns
    assert local_copy(packed.as_uri()) == copy
    assert copy.stat().st_mtime_ns == before
    packed.write_bytes(gzip.compress(b"[1, 2, 3]"))
    assert local_copy(str(packed)).read_bytes() == b"[1, 2, 3]"
    for damaged in (gzip.compress(b"[1]" * 1000)[:-12], b"no gzip", gzip.compress(b"[1]" * 1000)[:-5] + b"oops!"):
        packed.write_bytes(damaged)
        with pytest.raises(DataError, match=r"rows\.json\.gz is damaged: .* Fetch the file again"):
            local_copy(str(packed))
    with pytest.raises(ObjectNotFoundError):
        local_copy(str(tmp_path / "none.gz"))
    assert not list(copy.parent.glob(".*"))
