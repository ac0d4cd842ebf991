"""Picture files, and URLs of them, as someone would make them who means harm; all from a seed."""

from __future__ import annotations

import base64
import functools
import io
import random
import struct
import zipfile
import zlib

from PIL import Image, PngImagePlugin

from tests.serving.test_images import png_of_claimed_size
from tests.serving.tiny_model import picture

KINDS = ("png", "jpeg", "webp", "gif")


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@functools.cache
def good(kind: str) -> bytes:
    return picture("green", format=kind.upper())


@functools.cache
def bombs() -> tuple[tuple[str, bytes], ...]:
    """Small files that would be large: over the limit, just below it, of many frames, of much text."""

    def black(side: int, kind: str) -> bytes:
        return picture("black", size=(side, side), format=kind, **({"optimize": True} if kind == "PNG" else {}))

    frames = [Image.new("P", (16, 16), index % 2) for index in range(10_000)]
    animation = io.BytesIO()
    frames[0].save(animation, "GIF", save_all=True, append_images=frames[1:], optimize=False)
    text = PngImagePlugin.PngInfo()
    for index in range(20):
        text.add_text(f"k{index}", "x" * 1_000_000, zip=True)
    texts = io.BytesIO()
    Image.new("RGB", (8, 8)).save(texts, "PNG", pnginfo=text)
    head = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", struct.pack(">IIBBBBB", 64, 64, 16, 6, 0, 0, 1))
    overfull = head + chunk(b"IDAT", zlib.compress(b"\0" * 30_000_000)) + chunk(b"IEND", b"")
    profile = head + chunk(b"iCCP", b"x\0\0" + zlib.compress(b"\0" * 30_000_000)) + chunk(b"IEND", b"")
    return (
        ("png", black(9000, "PNG")),
        ("png", black(2000, "PNG")),
        ("jpeg", black(6000, "JPEG")),
        ("webp", black(5500, "WEBP")),
        ("gif", animation.getvalue()),
        ("png", texts.getvalue()),
        ("png", overfull),
        ("png", profile),
        ("png", png_of_claimed_size(65535, 65535)),
        ("png", png_of_claimed_size(2**31 - 1, 1)),
        ("gif", b"GIF89a" + struct.pack("<HHBBB", 65535, 65535, 0x80, 0, 0) + b"\0" * 6 + b",\0\0\0\0" + b"\xff" * 5),
    )


@functools.cache
def foreign() -> tuple[bytes, ...]:
    """Files of other kinds, and files of two kinds at once."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("a.txt", "x")
    others = []
    for name in ("TIFF", "BMP", "ICO", "PPM", "TGA", "PCX", "EPS", "PDF"):
        buffer = io.BytesIO()
        Image.new("RGB", (16, 16), "red").save(buffer, name)
        others.append(buffer.getvalue())
    return (
        *others,
        good("png") + archive.getvalue(),
        good("jpeg") + b"<script>alert(1)</script>",
        b"GIF89a/*" + good("jpeg"),
        b"<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n(/etc/passwd) run\n",
        b"push graphic-context\nimage over 0,0 0,0 'url(http://127.0.0.1/)'\n",
        good("webp")[:12] + good("png"),
        b"",
        b"\0" * 64,
    )


def mutated(rng: random.Random, data: bytes) -> bytes:
    """Some bytes changed, taken out, doubled or cut."""
    content = bytearray(data)
    for _ in range(rng.randint(1, 8)):
        at = rng.randrange(max(len(content), 1))
        change = rng.randrange(5)
        if change == 0 and content:
            content[at % len(content)] = rng.randrange(256)
        elif change == 1:
            del content[at : at + rng.randint(1, 40)]
        elif change == 2:
            content[at:at] = rng.randbytes(rng.randint(1, 40))
        elif change == 3:
            content[at:at] = content[at : at + 64]
        else:
            content[at : at + 4] = struct.pack(">I", rng.choice([0, 1, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFF]))
    return bytes(content[: rng.randrange(len(content) + 1)] if rng.random() < 0.3 else content)


def hostile_picture(rng: random.Random) -> tuple[str, bytes]:
    """A type to claim, and a file's bytes."""
    choice = rng.random()
    if choice < 0.01:
        return rng.choice(bombs())
    if choice < 0.15:
        return rng.choice(KINDS), rng.choice(foreign())
    kind = rng.choice(KINDS)
    data = good(kind)
    if choice < 0.25:
        return rng.choice(KINDS), data
    if choice < 0.35:
        return kind, data[: rng.randrange(len(data))]
    if choice < 0.40:
        return kind, data
    return kind, mutated(rng, data)


def hostile_url(rng: random.Random) -> str:
    """A data URL with a hostile picture, or a hostile URL."""
    kind, data = hostile_picture(rng)
    encoded = base64.b64encode(data).decode()
    url = f"data:image/{kind};base64,{encoded}"
    tricks = [
        lambda: url,
        lambda: url,
        lambda: url,
        lambda: url.upper() if len(url) < 500 else url,
        lambda: f"data:image/{kind};charset=utf-8;base64,{encoded}",
        lambda: f"data:image/{kind};base64;base64,{encoded}",
        lambda: f"data:image/{kind},{encoded}",
        lambda: f"data:;base64,{encoded}",
        lambda: f"data:image/{rng.choice(['svg+xml', 'tiff', 'x-icon', '*', '../png', 'png' * 20])};base64,{encoded}",
        lambda: f" {url}",
        lambda: f"{url[:40]}\n{url[40:]}",
        lambda: f"{url}=",
        lambda: url[:-1],
        lambda: url.replace("+", "-").replace("/", "_"),
        lambda: url.replace(",", "%2C", 1),
        lambda: f"data:image/{kind};base64," + base64.b64encode(url.encode()).decode(),
        lambda: f"data:image/{kind};base64,é{encoded}",
        lambda: rng.choice(
            ["file:///etc/passwd", "http://127.0.0.1:1/", "https://169.254.169.254/", "", "/etc/passwd"]
        ),
        lambda: "data:image/png;base64," + "A" * rng.choice([1, 2, 3, 4, 100_000]),
    ]
    return rng.choice(tricks)()
