from __future__ import annotations

import tarfile
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shellv_core.data.sources.base import BadRowError
from shellv_core.data.sources.images import FolderImages, ImageStore, StoredImages, open_images
from shellv_core.errors import DataError, ObjectNotFoundError, StorageError
from shellv_core.storage import home, upload
from tests.data.sources.formats import images_named, write_files, write_tar, write_zip

IMAGES = images_named(12)
KINDS = ("folder", "tar", "gnu tar", "zip", "deflated zip")


def write(kind: str, path: Path, images: dict[str, bytes] = IMAGES) -> Path:
    if kind == "folder":
        return write_files(path, images)
    if kind.endswith("tar"):
        gnu = tarfile.GNU_FORMAT if kind.startswith("gnu") else tarfile.PAX_FORMAT
        return write_tar(path.with_suffix(".tar"), images, gnu)
    packed = zipfile.ZIP_DEFLATED if kind.startswith("deflated") else zipfile.ZIP_STORED
    return write_zip(path.with_suffix(".zip"), images, packed)


@pytest.fixture(params=[(kind, place) for kind in KINDS for place in ("here", "s3")], ids=lambda each: "-".join(each))
def store(request: pytest.FixtureRequest, tmp_path: Path) -> ImageStore:
    kind, place = request.param
    path = write(kind, tmp_path / "photo set")
    if place == "here":
        return open_images(str(path))
    uri = f"{request.getfixturevalue('bucket_uri')}/{path.name}"
    for each in [path] if path.is_file() else path.rglob("*"):
        if each.is_file():
            upload(each, uri if path.is_file() else f"{uri}/{each.relative_to(path)}")
    return open_images(uri)


def test_images_come_back_by_name(store: ImageStore) -> None:
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(store.read, IMAGES)) == list(IMAGES.values())
    assert store.read("./sub//deep/./a.b-c.jpeg") == IMAGES["sub/deep/a.b-c.jpeg"]


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gone.jpg", "image file missing"),
        ("sub", "image file missing"),
        ("PLAIN.jpg", "image file missing"),
        ("plain.jpg/x", "image file missing"),
        ("", "image path leaves the image folder"),
        (".", "image path leaves the image folder"),
        ("/etc/hostname", "image path leaves the image folder"),
        ("\\\\host\\x", "image path leaves the image folder"),
        ("sub/../../secret.jpg", "image path leaves the image folder"),
        ("file:///etc/hostname", "image path leaves the image folder"),
        ("https://x.org/a.jpg", "image path leaves the image folder"),
        ("a\0b", "image path leaves the image folder"),
    ],
)
def test_bad_names_have_a_reason(name: str, reason: str, tmp_path: Path) -> None:
    (tmp_path / "secret.jpg").write_bytes(b"x")
    for kind in KINDS:
        with pytest.raises(BadRowError) as error:
            open_images(str(write(kind, tmp_path / kind))).read(name)
        assert (error.value.reason, error.value.detail) == (reason, repr(name))


def test_odd_names_are_missing_and_not_a_crash(tmp_path: Path) -> None:
    for kind in KINDS:
        images = open_images(str(write(kind, tmp_path / kind)))
        for name in ("\ud800.jpg", "x" * 5000):
            with pytest.raises(BadRowError) as error:
                images.read(name)
            assert error.value.reason in ("image file missing", "image file unreadable")
            error.value.detail.encode()
            images.stamp(name)


def test_a_stamp_follows_the_image(tmp_path: Path) -> None:
    for kind in KINDS:
        path = write(kind, tmp_path / kind, {"x.jpg": b"image", "y.jpg": b"other"})
        before = open_images(str(path)).stamp("x.jpg")
        assert before == open_images(str(path)).stamp("x.jpg") != b""
        write(kind, tmp_path / kind, {"x.jpg": b"image!", "y.jpg": b"other"})
        assert open_images(str(path)).stamp("x.jpg") != before
    zipped = [open_images(str(write("zip", tmp_path / name, {"x.jpg": b"image"}))).stamp("x.jpg") for name in "ab"]
    assert zipped[0] == zipped[1]


def test_an_archive_is_listed_once_for_each_version(tmp_path: Path) -> None:
    lists = home() / "cache" / "sources"
    for count, kind in enumerate(("tar", "zip")):
        path = write(kind, tmp_path / "set", {"a.jpg": b"one"})
        assert open_images(str(path)).read("a.jpg") == b"one"
        listed = {each: each.stat().st_mtime_ns for each in lists.iterdir()}
        assert open_images(str(path)).read("a.jpg") == b"one"
        assert {each: each.stat().st_mtime_ns for each in lists.iterdir()} == listed
        write(kind, tmp_path / "set", {"a.jpg": b"another"})
        assert open_images(str(path)).read("a.jpg") == b"another"
        assert len(list(lists.iterdir())) == 2 * count + 2


def test_an_archive_can_be_opened_many_times_at_once(tmp_path: Path) -> None:
    for kind in ("tar", "zip"):
        path = str(write(kind, tmp_path / "set", images_named(400)))
        with ThreadPoolExecutor(6) as pool:
            stores = list(pool.map(lambda _, path=path: open_images(path), range(6)))
            assert {store.read("plain.jpg") for store in stores} == {IMAGES["plain.jpg"]}
    assert len(list((home() / "cache" / "sources").iterdir())) == 2


def test_of_two_members_of_one_name_the_last_counts(tmp_path: Path) -> None:
    path = tmp_path / "set.tar"
    write_tar(path, {"a.jpg": b"old", "b.jpg": b"x"})
    with tarfile.open(path, "a") as archive:
        (tmp_path / "new").write_bytes(b"new")
        archive.add(tmp_path / "new", "./a.jpg")
    assert open_images(str(path)).read("a.jpg") == b"new"


def test_a_folder_of_an_archive(tmp_path: Path) -> None:
    for kind in ("tar", "zip"):
        path = write(kind, tmp_path / "set", {"train/a.jpg": b"a", "train/b/c.jpg": b"c", "val/a.jpg": b"v"})
        images = open_images(f"{path}/train/")
        assert [images.read("a.jpg"), images.read("b/c.jpg")] == [b"a", b"c"]
        assert open_images(f"{path.as_uri()}/val").read("a.jpg") == b"v"
        with pytest.raises(BadRowError, match="missing"):
            open_images(f"{path}/train/b").read("a.jpg")
    folder = tmp_path / "folder.zip"
    write_files(folder, {"in/a.jpg": b"f"})
    assert isinstance(open_images(str(folder / "in")), FolderImages)
    assert isinstance(open_images("s3://bucket/a.zipped/x"), StoredImages)


def test_damaged_archives_are_named(tmp_path: Path) -> None:
    good = {kind: write(kind, tmp_path / "good").read_bytes() for kind in ("tar", "zip")}
    tar = good["tar"]
    header = tar.rfind(b"more/00003.jpg") // 512 * 512
    last = tar.rfind(b"ustar") // 512 * 512
    for name, data, match in (
        ("cut.tar", tar[: len(tar) // 3], "cut off|damaged|no whole"),
        ("cut at a member.tar", tar[:header], "no end-of-archive block follows its last member"),
        ("garbled header.tar", tar[:header] + b"\xa5" * 512 + tar[header + 512 :], f"damaged at byte {header}"),
        ("zeroed header.tar", tar[:header] + bytes(512) + tar[header + 512 :], "damaged at byte"),
        ("cut in the last.tar", tar[: last + 700], r"cut off in member 'more/00005\.jpg'"),
        ("joined.tar", tar + tar, "damaged at byte .* tars that were joined"),
        ("packed.tar", b"\x1f\x8b" + bytes(range(256)) * 4, "no whole, uncompressed tar"),
        ("empty.tar", b"", "no whole, uncompressed tar|no end-of-archive"),
        ("cut.zip", good["zip"][:-100], "not a whole zip archive"),
        ("text.zip", b"text", "not a whole zip archive"),
        ("directory.zip", good["zip"].replace(b"PK\x01\x02", b"PK\x01\x09"), "not a whole zip archive"),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        with pytest.raises(DataError, match=match) as error:
            open_images(str(path)).read("plain.jpg")
        assert name in str(error.value)
    assert not list((home() / "cache" / "sources").glob("*"))


def test_damaged_members_of_a_zip_are_bad_rows(tmp_path: Path) -> None:
    for kind in ("zip", "deflated zip"):
        path = write(kind, tmp_path / "set", {"a.jpg": bytes(range(256)) * 20, "b.jpg": b"whole"})
        data = bytearray(path.read_bytes())
        data[45] ^= 0xFF
        path.write_bytes(data)
        images = open_images(str(path))
        with pytest.raises(BadRowError, match=r"its checksum in .* differs") as error:
            images.read("a.jpg")
        assert error.value.reason == "image truncated or corrupt"
        assert images.read("b.jpg") == b"whole"


def test_other_compressions_of_a_zip_are_named(tmp_path: Path) -> None:
    path = write_zip(tmp_path / "set.zip", {"a.jpg": b"x" * 100}, zipfile.ZIP_LZMA)
    with pytest.raises(BadRowError, match="compression method 14"):
        open_images(str(path)).read("a.jpg")


def test_what_is_no_image_store_is_said(tmp_path: Path, bucket_uri: str) -> None:
    (tmp_path / "a.tar.gz").write_bytes(b"x")
    for name in ("none", "a.tar.gz"):
        with pytest.raises(DataError, match=r"is not a folder; give the folder, \.zip or \.tar"):
            open_images(str(tmp_path / name))
    with pytest.raises(ObjectNotFoundError, match=r"none\.zip: no such file"):
        open_images(str(tmp_path / "none.zip"))
    with pytest.raises(ObjectNotFoundError):
        open_images(f"{bucket_uri}/none.tar")
    with pytest.raises(StorageError, match="does not exist"):
        open_images("s3://no-such-bucket/x").read("a.jpg")
