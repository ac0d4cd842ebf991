from __future__ import annotations

import json
from pathlib import Path

import pytest

from shellv_core import storage
from shellv_core.errors import IntegrityError, ObjectNotFoundError, OutputNotEmptyError
from shellv_core.storage import InputDirectory, Manifest, OutputDirectory


def manifest(fingerprint: str) -> Manifest:
    return Manifest(stage="t", fingerprint=fingerprint, library_version="0", config={})


def test_nothing_counts_before_the_commit(store_uri: str, tmp_path: Path) -> None:
    output = OutputDirectory(store_uri, "f1")
    assert output.finished() is None
    output.begin()
    output.put_bytes(b"one", "sub/one.txt")
    (tmp_path / "tree" / "inner").mkdir(parents=True)
    (tmp_path / "tree" / "inner" / "two.txt").write_text("two")
    output.put_tree(tmp_path / "tree", "model")
    with pytest.raises(ObjectNotFoundError, match="no finished output"):
        InputDirectory(store_uri)
    output.commit(manifest("f1"))
    found = InputDirectory(store_uri)
    assert [entry.name for entry in found.files()] == ["model/inner/two.txt", "sub/one.txt"]
    assert found.fetch("sub/one.txt").read_bytes() == b"one"
    assert (found.fetch_tree("model") / "inner" / "two.txt").read_text() == "two"
    stored = {uri.removeprefix(store_uri) for uri in storage.list_uris(store_uri)}
    assert stored == {"/manifest.json", "/model/inner/two.txt", "/sub/one.txt"}
    finished = OutputDirectory(store_uri, "f1").finished()
    assert finished is not None
    assert finished.fingerprint == "f1"


def test_a_cut_off_run_finds_its_files_again(store_uri: str) -> None:
    first = OutputDirectory(store_uri, "f1")
    first.begin()
    entry = first.put_bytes(b"one", "one.txt")
    again = OutputDirectory(store_uri, "f1")
    again.begin()
    assert again.done_files() == {"one.txt": entry}


def test_a_foreign_folder_is_refused_and_left_alone(store_uri: str) -> None:
    storage.write_bytes(f"{store_uri}/precious.txt", b"mine")
    with pytest.raises(OutputNotEmptyError, match=r"precious\.txt.*another output_uri"):
        OutputDirectory(store_uri, "f1").begin()
    assert storage.read_bytes(f"{store_uri}/precious.txt") == b"mine"


def test_the_output_of_another_run_is_refused(store_uri: str) -> None:
    first = OutputDirectory(store_uri, "f1")
    first.begin()
    with pytest.raises(OutputNotEmptyError, match="unfinished output of another run"):
        OutputDirectory(store_uri, "f2").begin()
    first.commit(manifest("f1"))
    with pytest.raises(OutputNotEmptyError, match="other settings or inputs"):
        OutputDirectory(store_uri, "f2").finished()


def test_abort_leaves_nothing(store_uri: str) -> None:
    output = OutputDirectory(store_uri, "f1")
    output.begin()
    output.put_bytes(b"one", "a/one.txt")
    output.abort()
    assert storage.list_uris(store_uri) == []
    path = storage.local_path(store_uri)
    assert path is None or not path.exists()


def test_damage_is_noticed(store_uri: str) -> None:
    output = OutputDirectory(store_uri, "f1")
    output.begin()
    output.put_bytes(b"one", "one.txt")
    output.commit(manifest("f1"))
    storage.write_bytes(f"{store_uri}/one.txt", b"two")
    with pytest.raises(IntegrityError, match=r"one\.txt differs from its manifest"):
        InputDirectory(store_uri).fetch("one.txt")
    storage.write_bytes(f"{store_uri}/manifest.json", json.dumps({"stage": 1}).encode())
    with pytest.raises(IntegrityError, match="not a manifest"):
        InputDirectory(store_uri)


def test_content_identity_is_of_the_files_alone(tmp_path: Path) -> None:
    identities = set()
    for place, stage in (("a", "one"), ("b", "two")):
        output = OutputDirectory((tmp_path / place).as_uri(), "f1")
        output.begin()
        output.put_bytes(b"one", "one.txt")
        output.commit(manifest("f1").model_copy(update={"stage": stage}))
        identities.add(InputDirectory((tmp_path / place).as_uri()).content_sha256)
    assert len(identities) == 1
