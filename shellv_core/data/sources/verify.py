"""Checks an encoded image to its last byte without keeping its pixels."""

from __future__ import annotations

import io
import re
from typing import Literal

from shellv_core.data.sources.base import BadRowError

ImageFormat = Literal["jpg", "png"]

MAX_PIXELS = 89_478_485  # 1 GiB as float32 RGB; PIL's bound against decompression bombs

_JPEG, _PNG = b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n"
_FORMATS: dict[str | None, ImageFormat] = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png"}
# libjpeg goes on after these and paints grey; PIL does not report them at all.
_CORRUPT = re.compile("premature end|bad Huffman|arithmetic|resync|hit marker", re.IGNORECASE)
_EXTRANEOUS = re.compile("(\\d+) extraneous bytes before marker 0x(..)")
_IN_SCANS = {"c4", "da", *(f"d{number}" for number in range(8))}  # tables, next scan, restart: what follows coded data


def verified_image(name: str, data: bytes) -> tuple[ImageFormat, int, int]:
    """Decode an image in full, which is the only way to see that it is whole.

    A JPEG is decoded grey at the smallest scale of the DCT: all its entropy-coded bytes are read, few pixels computed.

    Args:
        name: for the error.
        data: the encoded image.

    Returns:
        Its format by content, not by name, and width and height in pixels as stored (EXIF rotation not applied).

    Raises:
        BadRowError: if it is damaged, larger than `MAX_PIXELS`, or neither JPEG nor PNG.
    """
    return _jpeg(name, data) if data.startswith(_JPEG) else _by_pil(name, data)


def _jpeg(name: str, data: bytes) -> tuple[ImageFormat, int, int]:
    import simplejpeg

    try:
        height, width, _, _ = simplejpeg.decode_jpeg_header(data, strict=False)
    except (ValueError, KeyError):
        return _by_pil(name, data)  # an unusual sampling of the colors, or no JPEG behind the first bytes
    _check_size(name, width, height)
    try:
        simplejpeg.decode_jpeg(
            data, colorspace="GRAY", fastdct=True, fastupsample=True, min_height=1, min_width=1, strict=True
        )
    except ValueError as error:
        if _CORRUPT.search(str(error)) or _has_torn_scan(data, str(error)):
            raise _corrupt(name, data, error) from None
        return _by_pil(name, data)
    return "jpg", width, height


def _has_torn_scan(data: bytes, complaint: str) -> bool:
    """Whether surplus bytes are the rest of a damaged scan, and not fill bytes before the end marker."""
    found = _EXTRANEOUS.search(complaint)
    if found is None:
        return False
    end = data.rfind(b"\xff\xd9")
    return found[2] in _IN_SCANS or (found[2] == "d9" and len(set(data[end - int(found[1]) : end])) != 1)


def _by_pil(name: str, data: bytes) -> tuple[ImageFormat, int, int]:
    import struct

    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.format not in _FORMATS:
                raise BadRowError(
                    "image format not supported", f"{name!r} is {image.format}; convert it to JPEG or PNG"
                )
            _check_size(name, *image.size)
            image.load()
            return _FORMATS[image.format], image.width, image.height
    except Image.DecompressionBombError as error:
        raise BadRowError("image too large", f"{name!r}: {error}") from None
    except (OSError, SyntaxError, ValueError, EOFError, IndexError, struct.error) as error:
        raise _corrupt(name, data, error) from None


def _check_size(name: str, width: int, height: int) -> None:
    if width * height > MAX_PIXELS:
        raise BadRowError("image too large", f"{name!r} has {width}x{height} pixels; at most {MAX_PIXELS} are read")


def _corrupt(name: str, data: bytes, error: Exception) -> BadRowError:
    return BadRowError("image truncated or corrupt", f"{name!r} ({len(data)} bytes): {error}")
