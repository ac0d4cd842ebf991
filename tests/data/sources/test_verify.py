from __future__ import annotations

import io
import random
from pathlib import Path

import pytest
from PIL import Image

from shellv_core.data.sources import verify
from shellv_core.data.sources.base import BadRowError
from shellv_core.data.sources.verify import verified_image
from tests.data.photos import photo_like_jpeg, three_photos


def encoded(kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    buffer = io.BytesIO()
    with Image.open(io.BytesIO(photo_like_jpeg(3))) as image:
        image.convert(mode).save(buffer, kind, **options)
    return buffer.getvalue()


def exif(orientation: int) -> bytes:
    found = Image.Exif()
    found[0x0112] = orientation
    return found.tobytes()


JPEG = encoded()
GOOD = {
    "plain": JPEG,
    "progressive": encoded(progressive=True),
    "grayscale": encoded(mode="L"),
    "cmyk": encoded(mode="CMYK"),
    "4:4:4": encoded(subsampling=0),
    "restart markers": encoded(restart_marker_blocks=4),
    "rotated by exif": encoded(exif=exif(6)),
    "bytes behind the end": JPEG + b"hello" * 20,
    "zeros before the end": JPEG[:-2] + bytes(30) + JPEG[-2:],
    "png": encoded("PNG"),
    "png with alpha": encoded("PNG", "RGBA"),
    "png palette": encoded("PNG", "P"),
}


@pytest.mark.parametrize("kind", GOOD)
def test_whole_images_pass(kind: str) -> None:
    assert verified_image("x", GOOD[kind]) == ("png" if kind.startswith("png") else "jpg", 320, 240)


def test_photographs_pass() -> None:
    for name, data in three_photos().items():
        with Image.open(io.BytesIO(data)) as image:
            assert verified_image(name, data) == ("jpg", *image.size)


def damaged() -> dict[str, bytes]:
    progressive, png = GOOD["progressive"], GOOD["png"]
    half = len(JPEG) // 2
    noise = random.Random(0).randbytes(600)
    return {
        "empty": b"",
        "text": b"no image at all",
        "header only": JPEG[:300],
        "half": JPEG[:half],
        "without its last bytes": JPEG[:-2],
        "progressive half": progressive[: len(progressive) // 2],
        "a large zeroed block": JPEG[:half] + bytes(6000) + JPEG[half + 6000 :],
        "progressive, zeroed": progressive[:half] + bytes(4000) + progressive[half + 4000 :],
        "garbage amid": JPEG[:half] + noise + JPEG[half + 600 :],
        "cut amid": JPEG[:half] + JPEG[half + 700 :],
        "garbled header": JPEG[:4] + noise[:200] + JPEG[204:],
        "all zeroed": bytes(len(JPEG)),
        "png half": png[: len(png) // 2],
        "png flipped": png[:5000] + bytes([png[5000] ^ 1]) + png[5001:],
        "png header": png[:20],
    }


@pytest.mark.parametrize("kind", damaged())
def test_damaged_images_are_refused(kind: str) -> None:
    data = damaged()[kind]
    with pytest.raises(BadRowError) as error:
        verified_image("a b.jpg", data)
    assert error.value.reason == "image truncated or corrupt"
    assert f"'a b.jpg' ({len(data)} bytes): " in error.value.detail


def test_far_more_damage_is_seen_than_a_plain_decode_sees() -> None:
    generator = random.Random(1)
    seen = seen_by_pil = 0
    for _ in range(60):
        place = generator.randrange(1000, len(JPEG) - 3000)
        data = JPEG[:place] + bytes(2000) + JPEG[place + 2000 :]
        try:
            verified_image("x", data)
        except BadRowError:
            seen += 1
        try:
            with Image.open(io.BytesIO(data)) as image:
                image.load()
        except OSError:
            seen_by_pil += 1
    assert seen >= 54
    assert seen_by_pil < seen / 2


def test_other_formats_are_named() -> None:
    for kind in ("WEBP", "GIF", "BMP", "TIFF"):
        with pytest.raises(BadRowError, match=kind) as error:
            verified_image("x", encoded(kind))
        assert error.value.reason == "image format not supported"
        assert "convert it to JPEG or PNG" in error.value.detail


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_bombs_are_refused_before_they_are_decoded(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(verify, "MAX_PIXELS", 320 * 240 - 1)
    with pytest.raises(BadRowError, match="320x240 pixels") as error:
        verified_image("x", encoded(kind))
    assert error.value.reason == "image too large"


def test_a_real_bomb_is_refused(tmp_path: Path) -> None:
    data = bytearray(encoded("PNG"))
    import struct
    import zlib

    data[16:24] = struct.pack(">II", 60000, 60000)
    data[29:33] = struct.pack(">I", zlib.crc32(data[12:29]))
    with pytest.raises(BadRowError) as error:
        verified_image("x", bytes(data))
    assert error.value.reason == "image too large"
