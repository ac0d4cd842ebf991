"""The commands of docs/data.md and docs/resuming.md, run as they stand there."""

from __future__ import annotations

import io
import json
import re
import shlex
import tarfile
import zipfile
from pathlib import Path
from typing import Any, get_args

import pytest

from shellv_core.cli import _parser, main
from shellv_core.data.config import ROW_SOURCES
from shellv_core.data.hallucination.config import HallucinationConfig
from shellv_core.storage import read_manifest
from shellv_core.templates import TEMPLATES
from shellv_core.training.config import TrainingConfig
from tests.data.photos import photo_like_jpeg
from tests.e2e.conftest import REPOSITORY

pytestmark = [pytest.mark.e2e]

DOCUMENT = (REPOSITORY / "docs" / "data.md").read_text(encoding="utf-8")
LINES = re.findall(r"^shellv .*$", DOCUMENT, re.MULTILINE)
NAMES = [f"{number}.jpg" for number in range(3)]


def test_every_command_works(
    tmp_path: Path, tracking_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    make_everything(tmp_path)
    monkeypatch.chdir(tmp_path)
    done_sources = set()
    for line in LINES:
        program, *arguments = shlex.split(line.replace("/tmp/shellv-demo", str(tmp_path / "demo")))
        assert program == "shellv"
        capsys.readouterr()
        code = main(arguments)
        said = capsys.readouterr()
        assert code == 0, (line, said.err)
        if arguments[0] == "prepare_data":
            result = json.loads(said.out)
            assert result["metrics"]["num_train_samples"] == 3, line
            assert read_manifest(result["output_uri"]).details["rejected_counts"] == {}
            done_sources |= {argument.partition(".")[0] for argument in arguments[1:]} & set(ROW_SOURCES)
    assert done_sources == set(ROW_SOURCES)
    assert (tmp_path / "page.html").read_text().count("<img ") == 3


def test_the_tables_are_complete_and_links_lead_somewhere() -> None:
    generators = get_args(HallucinationConfig.model_fields["generator"].annotation)
    assert re.findall(r"^\| `(\w+)` \|", DOCUMENT, re.MULTILINE) == [*ROW_SOURCES, *generators]
    for name in TEMPLATES:
        assert f"`{name}`" in DOCUMENT
    for path in re.findall(r"\]\((?!http)([^)]+)\)", DOCUMENT):
        assert (REPOSITORY / "docs" / path).exists(), path


def test_every_command_on_resuming_works(
    tmp_path: Path, tracking_store: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    text = (REPOSITORY / "docs" / "resuming.md").read_text(encoding="utf-8").replace("\\\n", " ")
    monkeypatch.chdir(tmp_path)
    for line in re.findall(r"^shellv .*$", text, re.MULTILINE):
        code = main(shlex.split(line.replace("/tmp/shellv-demo", str(tmp_path / "demo")))[1:])
        assert code == 0, (line, capsys.readouterr().err)
    assert sorted(path.name for path in (tmp_path / "demo").iterdir()) == ["data", "model"]
    for name in re.findall(r"`training\.(\w+)`", text):
        assert name in TrainingConfig.model_fields


#: What a console shows, commands and output, is held against the program elsewhere.
CONSOLE = re.compile(r"^```console\n.*?^```$", re.DOTALL | re.MULTILINE)
DOCUMENTS = [
    path.relative_to(REPOSITORY).as_posix()
    for path in (REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md")))
    if re.search(r"^shellv ", CONSOLE.sub("", path.read_text(encoding="utf-8")), re.MULTILINE)
]


@pytest.mark.parametrize("name", DOCUMENTS)
def test_every_command_is_one_that_the_program_takes(name: str) -> None:
    text = CONSOLE.sub("", (REPOSITORY / name).read_text(encoding="utf-8")).replace("\\\n", " ")
    lines = re.findall(r"^shellv .*$", text, re.MULTILINE)
    assert lines
    for line in lines:
        _, *arguments = shlex.split(line, comments=True)
        # Of alternatives (llava|shellv) the first.
        arguments = [argument.partition("|")[0] for argument in arguments]
        try:
            _parser(arguments[0]).parse_args(arguments)
        except SystemExit as stop:
            if stop.code == 0:
                continue
            pytest.fail(f"{name}: {line!r} is not understood (exit code {stop.code})")


def make_everything(folder: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    photos = {name: photo_like_jpeg(number) for number, name in enumerate(NAMES)}
    for place in ("images", "sidecars", "tables", "tars"):
        (folder / place).mkdir()
    with zipfile.ZipFile(folder / "photos.zip", "w") as archive, tarfile.open(folder / "images.tar", "w") as tar:
        for name, photo in photos.items():
            (folder / "images" / name).write_bytes(photo)
            (folder / "sidecars" / name).write_bytes(photo)
            (folder / "sidecars" / name).with_suffix(".txt").write_text(f"A photo called {name}.")
            archive.writestr(name, photo)
            add(tar, name, photo)
    turns = [{"from": "human", "value": "<image>\nWhat is shown?"}, {"from": "gpt", "value": "A photo."}]
    rows: list[Any] = [{"id": name, "image": name, "conversations": turns} for name in NAMES]
    (folder / "chat.json").write_text(json.dumps(rows))
    lies = [{"type": "Event Hallucination", "caption": "A photo burns.", "from": "gpt-4"}]
    rows = [{"image": name, "caption": "A photo.", "hal_caption": lies} for name in NAMES]
    (folder / "hal_eval.json").write_text(json.dumps(rows))
    images = [{"id": number, "file_name": name} for number, name in enumerate(NAMES)]
    captions = [{"id": n, "image_id": n, "caption": "A cat."} for n in range(3)]
    (folder / "captions.json").write_text(json.dumps({"images": images, "annotations": captions}))
    instances = [{"id": n, "image_id": n, "category_id": 17} for n in range(3)]
    categories = [{"id": 17, "name": "cat"}]
    objects = {"images": images, "annotations": instances, "categories": categories}
    (folder / "instances.json").write_text(json.dumps(objects))
    (folder / "captions.tsv").write_text("".join(f"A photo called {name}.\t{name}\n" for name in NAMES))
    table = pa.table({
        "image": [{"bytes": photo, "path": name} for name, photo in photos.items()],
        "caption": [f"A photo called {name}." for name in NAMES],
    })  # fmt: skip
    pq.write_table(table, folder / "tables" / "train.parquet")
    with tarfile.open(folder / "tars" / "00000.tar", "w") as tar:
        for name, photo in photos.items():
            add(tar, name, photo)
            add(tar, name.replace(".jpg", ".txt"), f"A photo called {name}.".encode())


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))
