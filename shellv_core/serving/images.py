"""Pictures out of ``data:`` URLs, with every limit checked before the work that it limits.

Nothing here opens a file or a connection.
"""

from __future__ import annotations

import base64
import binascii
import io
import re
import struct
import warnings
import zlib
from typing import TYPE_CHECKING

from shellv_core.config import Config
from shellv_core.serving.engine import RequestError

if TYPE_CHECKING:
    from PIL import Image

FORMATS = {"png": "PNG", "jpeg": "JPEG", "webp": "WEBP", "gif": "GIF"}
HEADER = re.compile(r"data:image/([a-z0-9.+-]{1,32});base64,", re.IGNORECASE)


class ImageLimits(Config):
    """What a picture in a request may cost."""

    max_images: int = 8
    max_bytes: int = 10 << 20
    """Of one encoded picture."""
    max_pixels: int = 25_000_000
    max_side: int = 8192
    """Width or height in pixels."""
    max_aspect_ratio: float = 100.0
    """Long side to short side. Preprocessing scales the *short* side to the model's size, so a thin line would
    become gigabytes."""
    decode_seconds: float = 5.0
    """For one picture; the process that decodes it is then killed."""
    decode_processes: int = 2
    decode_bytes: int = 1 << 30
    """Address space of one such process."""
    max_pixels_in_flight: int = 250_000_000
    """Of all pictures that requests hold, at three bytes each; a request beyond it is told to come back."""


def parse_data_url(url: str, limits: ImageLimits, param: str) -> tuple[bytes, str]:
    """The bytes of the picture file in `url`, and its format as Pillow calls it.

    Args:
        url: ``data:image/TYPE;base64,DATA`` with TYPE one of png, jpeg, webp and gif.
        limits: bounds on bytes.
        param: the request's field, for the error.

    Raises:
        RequestError: if the URL is of another kind, broken or too long.
    """
    image_format = _image_format(url, param)
    return _image_bytes(url, limits, param), image_format


def _image_format(url: str, param: str) -> str:
    header = HEADER.match(url)
    if header is None:
        raise RequestError(
            f"an image URL must begin with data:image/TYPE;base64, but this one begins with {url[:24]!r};"
            f" TYPE is one of {', '.join(FORMATS)}.",
            param,
            "invalid_image_url",
        )
    kind = header.group(1).lower()
    if kind not in FORMATS:
        raise RequestError(
            f"pictures of type image/{kind} are not read; allowed: {', '.join(FORMATS)}.",
            param,
            "unsupported_image_type",
        )
    return FORMATS[kind]


def _image_bytes(url: str, limits: ImageLimits, param: str) -> bytes:
    encoded = url.partition(",")[2]
    if len(encoded) > -(-limits.max_bytes // 3) * 4:
        raise RequestError(
            f"a picture may have {limits.max_bytes} bytes; this one has about {len(encoded) * 3 // 4}.",
            param,
            "image_too_large",
        )
    try:
        return base64.b64decode(encoded, validate=True)
    except (binascii.Error, ValueError):
        raise RequestError(
            "the picture's data is not valid base64 (standard alphabet, padded, no line breaks).",
            param,
            "invalid_base64",
        ) from None


def decode_image(data: bytes, image_format: str, limits: ImageLimits, param: str | None) -> Image.Image:
    """The first frame of a picture file, upright and in RGB.

    Args:
        data: the file.
        image_format: one of the values of `FORMATS`; no other of Pillow's readers sees the bytes.
        limits: bounds on pixels.
        param: the request's field, for the error.

    Raises:
        RequestError: if the file is broken, of another format or over a limit.
    """
    from PIL import Image, ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata, and about sizes, which are checked below
            with Image.open(io.BytesIO(data), formats=[image_format]) as image:
                _check_size(image.size, limits, param)
                image.load()
                return ImageOps.exif_transpose(image).convert("RGB")
    except (
        OSError,
        SyntaxError,
        ValueError,
        EOFError,
        LookupError,
        TypeError,
        OverflowError,
        struct.error,
        zlib.error,
        Image.DecompressionBombError,
    ):
        # What Pillow's decoders raise on broken files; the bytes are the client's, so is the fault.
        raise RequestError(
            f"the picture's {len(data)} bytes are not a complete image/{image_format.lower()} file.",
            param,
            "invalid_image",
        ) from None


def _check_size(size: tuple[int, int], limits: ImageLimits, param: str | None) -> None:
    width, height = size
    allowed = (
        width * height <= limits.max_pixels
        and max(size) <= limits.max_side
        and max(size) <= limits.max_aspect_ratio * min(size)
    )
    if not allowed:
        raise RequestError(
            f"the picture has {width} x {height} pixels; allowed are {limits.max_pixels} pixels in all, sides of"
            f" {limits.max_side} and a long side {limits.max_aspect_ratio:g} times the short one.",
            param,
            "image_too_large",
        )
