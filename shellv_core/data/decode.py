"""Encoded images to square uint8 pictures, on the CPU; normalised to floats later, on the device that trains.

The geometry is that of the models' own processor (transformers ``LlavaImageProcessorPil``): with padding, the image is
put into a square of the mean color and resized; without, its shorter side is resized and the middle cut out. JPEGs go
through libjpeg-turbo and torch's uint8 resize; what those do not read (PNG, CMYK, turned by EXIF) goes through Pillow.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from shellv_core.errors import DataError

if TYPE_CHECKING:
    import torch

MAX_PIXELS = 178_956_970  # Pillow's own limit, beyond which it suspects a decompression bomb
ORIENTATION = 0x0112


def decode_image(data: bytes, size: int, padding: Sequence[int] | None) -> torch.Tensor:
    """Decode and resize an image: uint8 RGB of shape (3, size, size).

    Args:
        data: JPEG, PNG or whatever else Pillow reads.
        padding: the color (0..255 each) around an image that is not square, see `padding_color`; None cuts the middle
            square out instead.

    Raises:
        DataError: if the bytes are no image, or a huge one.
    """

    pixels = _jpeg_pixels(data)
    if pixels is None:
        pixels = _pillow_pixels(data)
    height, width, _ = pixels.shape
    if padding is not None:
        if _fits(height, width, size):
            inner = (height * size // max(height, width), width * size // max(height, width))
            return _framed(_resized(pixels, inner), size, padding)
        pixels = _padded(pixels, padding)
        target = (size, size)
    elif height <= width:
        target = (size, int(size * width / height))
    else:
        target = (int(size * height / width), size)
    resized = _resized(pixels, target)
    top, left = (target[0] - size) // 2, (target[1] - size) // 2
    return resized[:, top : top + size, left : left + size].contiguous()


def padding_color(mean: Sequence[float]) -> tuple[int, ...]:
    """The color (0..255) of an image mean in 0..1, cut to integers as LLaVA does it."""
    return tuple(int(value * 255) for value in mean)


def normalize(
    pixels: torch.Tensor, mean: Sequence[float], std: Sequence[float], dtype: torch.dtype | None = None
) -> torch.Tensor:
    """Pixel values for the vision tower: ``(pixels / 255 - mean) / std``, on the device of `pixels`.

    Args:
        pixels: uint8 (n, 3, height, width).
        mean, std: of each channel, in 0..1.
        dtype: of the result; computed in float32 before.
    """
    import torch

    scale = torch.tensor([1 / (255 * value) for value in std], device=pixels.device).view(3, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=pixels.device).view(3, 1, 1)
    values = torch.addcmul(shift, pixels.to(torch.float32), scale)
    return values if dtype is None else values.to(dtype)


def _fits(height: int, width: int, size: int) -> bool:
    """Whether an image may be resized before it is padded: where that moves no pixel, as for 640 x 480, only the seams
    differ (0.07 of 255 in the mean), and a fourth of the resize and a copy are saved."""
    short, long = sorted((height, width))
    inner, rest = divmod(short * size, long)
    return long >= size and not rest and (size - inner) % 2 == 0 and (long - short) % 2 == 0


def _resized(pixels: np.ndarray, target: tuple[int, int]) -> torch.Tensor:
    import torch

    planes = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    return torch.nn.functional.interpolate(planes, target, mode="bicubic", antialias=True)[0]


def _framed(inner: torch.Tensor, size: int, color: Sequence[int]) -> torch.Tensor:
    square = inner.new_tensor(color).view(3, 1, 1).repeat(1, size, size)
    top, left = (size - inner.shape[1]) // 2, (size - inner.shape[2]) // 2
    square[:, top : top + inner.shape[1], left : left + inner.shape[2]] = inner
    return square


def _jpeg_pixels(data: bytes) -> np.ndarray | None:
    """(height, width, 3), or None where Pillow must look at it."""
    import simplejpeg

    if not data.startswith(b"\xff\xd8") or _is_turned(data):
        return None
    try:
        height, width, color, _ = simplejpeg.decode_jpeg_header(data)
        if color == "CMYK" or height * width > MAX_PIXELS:
            return None
        pixels: np.ndarray = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError:
        return None  # Pillow has the better words for what is wrong, or reads it all the same
    return pixels


def _is_turned(data: bytes) -> bool:
    """Whether EXIF says that the picture is to be shown turned or mirrored."""
    from PIL import Image

    if b"Exif\0\0" not in data[:4096]:
        return False
    try:
        return Image.open(io.BytesIO(data)).getexif().get(ORIENTATION, 1) != 1
    except (OSError, ValueError, SyntaxError):
        return False


def _pillow_pixels(data: bytes) -> np.ndarray:
    from PIL import Image, ImageOps

    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.width * image.height > MAX_PIXELS:
                raise DataError(
                    f"an image of {image.width} x {image.height} pixels is too large; allowed are {MAX_PIXELS} pixels."
                    " Leave it out or make it smaller when the data is prepared."
                )
            return np.array(ImageOps.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise DataError(
            f"an image of {len(data)} bytes cannot be decoded ({error}). Leave it out when the data is prepared."
        ) from None


def _padded(pixels: np.ndarray, color: Sequence[int]) -> np.ndarray:
    height, width, _ = pixels.shape
    side = max(height, width)
    if height == width:
        return pixels
    # As rows of bytes: filling pixel by pixel takes as long as the resize.
    square = np.empty((side, side * 3), dtype=np.uint8)
    border = np.tile(np.asarray(color, dtype=np.uint8), side)
    top, left = (side - height) // 2, (side - width) // 2
    square[:top] = border
    square[top + height :] = border
    square[:, : left * 3] = border[: left * 3]
    square[:, (left + width) * 3 :] = border[(left + width) * 3 :]
    square[top : top + height, left * 3 : (left + width) * 3] = pixels.reshape(height, width * 3)
    return square.reshape(side, side, 3)
