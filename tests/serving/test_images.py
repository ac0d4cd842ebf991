from __future__ import annotations

import base64
import contextlib
import io
import struct
import zlib

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from shellv_core.serving.engine import RequestError
from shellv_core.serving.images import ImageLimits, decode_image, parse_data_url
from tests.serving.tiny_model import data_url, picture

LIMITS = ImageLimits()


def decode(url, limits=LIMITS):
    return decode_image(*parse_data_url(url, limits, "here"), limits, "here")


def png_of_claimed_size(width, height):
    """A PNG header that claims a size, and nearly no data."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("kind", "mime"), [("PNG", "png"), ("JPEG", "jpeg"), ("WEBP", "webp"), ("GIF", "gif")])
def test_every_allowed_format(kind, mime):
    image = decode(data_url(picture("red", format=kind), f"image/{mime}"))
    assert (image.mode, image.size) == ("RGB", (48, 40))
    assert image.getpixel((5, 5))[0] > 200


def test_pictures_are_turned_upright():
    exif = Image.Exif()
    exif[0x0112] = 6
    assert decode(data_url(picture(size=(60, 20), format="JPEG", exif=exif), "image/jpeg")).size == (20, 60)


def test_the_first_frame_of_an_animation():
    frames = [Image.new("P", (8, 8), index) for index in range(3)]
    buffer = io.BytesIO()
    frames[0].save(buffer, "GIF", save_all=True, append_images=frames[1:])
    assert decode(data_url(buffer.getvalue(), "image/gif")).size == (8, 8)


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("http://example.com/a.png", "invalid_image_url"),
        ("file:///etc/passwd", "invalid_image_url"),
        ("/etc/passwd", "invalid_image_url"),
        ("", "invalid_image_url"),
        ("data:image/png,abc", "invalid_image_url"),
        ("data:text/html;base64,YWJj", "invalid_image_url"),
        (data_url(picture(format="TIFF"), "image/tiff"), "unsupported_image_type"),
        ("data:image/svg+xml;base64,PHN2Zy8+", "unsupported_image_type"),
        ("data:image/png;base64,####", "invalid_base64"),
        ("data:image/png;base64,iVBOR", "invalid_base64"),
        ("data:image/png;base64,iVBO\nRw0K", "invalid_base64"),
        ("data:image/png;base64,ü", "invalid_base64"),
        ("data:image/png;base64,", "invalid_image"),
        (data_url(picture(format="JPEG"), "image/png"), "invalid_image"),
        (data_url(picture(size=(400, 400), format="JPEG")[:-200], "image/jpeg"), "invalid_image"),
        (data_url(picture()[:60]), "invalid_image"),
        (data_url(png_of_claimed_size(64, 64)), "invalid_image"),
        (data_url(png_of_claimed_size(8000, 8000)), "image_too_large"),
        (data_url(png_of_claimed_size(100_000, 3)), "image_too_large"),
        (data_url(picture(size=(2000, 2))), "image_too_large"),
    ],
)
def test_what_is_refused(url, code):
    with pytest.raises(RequestError) as caught:
        decode(url)
    assert (caught.value.code, caught.value.param) == (code, "here")


def test_a_bomb_is_refused_before_it_is_decoded(monkeypatch):
    bomb = picture(size=(6000, 6000), color="black", optimize=True)
    assert len(bomb) < 200_000
    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", lambda self: pytest.fail("the bomb was decoded"))
    with pytest.raises(RequestError, match="6000 x 6000 pixels; allowed are 25000000"):
        decode(data_url(bomb))


def test_the_encoded_size_is_checked_before_base64(monkeypatch):
    limits = ImageLimits(max_bytes=300)
    exact = picture() + b"\0" * (300 - len(picture()))
    assert decode(data_url(exact), limits).size == (48, 40)
    monkeypatch.setattr("base64.b64decode", lambda *_, **__: pytest.fail("it was decoded"))
    with pytest.raises(RequestError, match="may have 300 bytes"):
        decode(data_url(exact + b"\0" * 3), limits)


@settings(max_examples=150, deadline=None)
@given(
    mime=st.sampled_from(["png", "jpeg", "webp", "gif"]),
    cut=st.integers(0, 400),
    noise=st.binary(max_size=20),
    at=st.integers(0, 400),
)
def test_broken_bytes_never_raise_anything_else(mime, cut, noise, at):
    data = bytearray(picture("green", format=mime.upper()))
    data[at : at + len(noise)] = noise
    data = bytes(data[: len(data) - cut])
    with contextlib.suppress(RequestError):
        assert decode(f"data:image/{mime};base64,{base64.b64encode(data).decode()}").mode == "RGB"
