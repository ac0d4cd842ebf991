from __future__ import annotations

import shutil

import pytest

from shellv_core.errors import ServingError, StorageError
from shellv_core.serving.reference import fetch_model
from shellv_core.storage import Manifest, OutputDirectory, join


def commit(uri, model_path):
    output = OutputDirectory(uri, "f")
    output.begin()
    output.put_tree(model_path, "model")
    output.commit(Manifest(stage="t", fingerprint="f", library_version="0", config={}))


def test_every_way_to_name_a_model_gives_the_same_revision(tmp_path, model_path, store_uri):
    uri = join(store_uri, "merged")
    commit(uri, model_path)
    direct = fetch_model(str(model_path))
    committed = fetch_model(uri)
    assert committed.revision == direct.revision == fetch_model(f"{uri}/model").revision
    assert fetch_model(model_path.as_uri()).revision == direct.revision
    assert (committed.name, direct.name) == ("merged", model_path.name)
    assert (committed.path / "config.json").is_file()


def test_registered_versions(tmp_path, model_path):
    from shellv_core.tracking.runs import open_client

    uri = (tmp_path / "merged").as_uri()
    commit(uri, model_path)
    client = open_client()
    client.create_registered_model("tiny")
    client.create_model_version("tiny", source=uri)
    client.set_registered_model_alias("tiny", "champion", "1")
    for reference in ("models:/tiny@champion", "models:/tiny/1"):
        found = fetch_model(reference)
        assert (found.name, found.revision) == ("tiny", fetch_model(str(model_path)).revision)
    for reference in ("models:/tiny@candidate", "models:/tiny/2", "models:/tony@champion"):
        with pytest.raises(ServingError, match="names no registered version"):
            fetch_model(reference)


def test_the_revision_changes_with_any_byte(tmp_path, model_path):
    copy = tmp_path / "copy"
    shutil.copytree(model_path, copy)
    assert fetch_model(str(copy)).revision == fetch_model(str(model_path)).revision
    with (copy / "chat_template.jinja").open("a") as file:
        file.write(" ")
    assert fetch_model(str(copy)).revision != fetch_model(str(model_path)).revision


@pytest.mark.parametrize(
    ("reference", "error", "message"),
    [
        ("/nowhere/model", ServingError, "has no config.json"),
        ("models:tiny", ServingError, "use models:/NAME@ALIAS"),
        ("file:///nowhere", StorageError, "no finished output"),
    ],
)
def test_what_names_nothing(reference, error, message):
    with pytest.raises(error, match=message):
        fetch_model(reference)
