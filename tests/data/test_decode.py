from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers.models.llava.image_processing_pil_llava import LlavaImageProcessorPil

from shellv_core.data.decode import decode_image, normalize, padding_color
from shellv_core.errors import DataError
from tests.data.photos import SHARED_IMAGES, photo_like_jpeg

SIZE = 336
PHOTOS = sorted(SHARED_IMAGES.glob("*.jpg")) if SHARED_IMAGES.is_dir() else []


def mean_error(data: bytes, pad: bool = True) -> float:
    """Mean absolute difference to the model's own processor, in 1/255."""
    processor = LlavaImageProcessorPil(
        do_pad=pad, size={"shortest_edge": SIZE}, crop_size={"height": SIZE, "width": SIZE}
    )
    mean, std = processor.image_mean, processor.image_std
    expected = processor(images=[Image.open(io.BytesIO(data)).convert("RGB")], return_tensors="pt")["pixel_values"]
    ours = decode_image(data, SIZE, padding_color(mean) if pad else None)
    assert ours.shape == (3, SIZE, SIZE)
    assert ours.dtype == torch.uint8
    difference = (normalize(ours[None], mean, std) - expected).abs() * 255 * torch.tensor(std).view(3, 1, 1)
    return float(difference.mean())


def encoded(image: Image.Image, format_: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format_, **options)
    return buffer.getvalue()


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("path", PHOTOS, ids=lambda path: path.stem)
def test_photos_look_as_the_processor_makes_them(path: Path, pad: bool) -> None:
    assert mean_error(path.read_bytes(), pad) < 0.1


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("size", [(640, 480), (333, 500), (900, 901), (336, 336), (120, 80), (1, 9)])
def test_pictures_of_any_shape_look_as_the_processor_makes_them(size: tuple[int, int], pad: bool) -> None:
    assert mean_error(photo_like_jpeg(3, size), pad) < 0.1


def test_png_gray_palette_and_cmyk_are_read() -> None:
    picture = Image.open(io.BytesIO(photo_like_jpeg(1)))
    for data in (
        encoded(picture, "PNG"),
        encoded(picture.convert("RGBA"), "PNG"),
        encoded(picture.convert("P"), "PNG"),
        encoded(picture.convert("L"), "JPEG"),
        encoded(picture.convert("CMYK"), "JPEG"),
    ):
        assert mean_error(data) < 0.1


def test_a_turned_photo_is_turned_back() -> None:
    picture = Image.open(io.BytesIO(photo_like_jpeg(2)))
    exif = Image.Exif()
    exif[0x0112] = 6
    turned = encoded(picture.transpose(Image.Transpose.ROTATE_90), "PNG", exif=exif)
    jpeg = encoded(picture.transpose(Image.Transpose.ROTATE_90), "JPEG", quality=100, subsampling=0, exif=exif)
    upright = decode_image(encoded(picture, "PNG"), SIZE, (0, 0, 0)).float()
    assert (decode_image(turned, SIZE, (0, 0, 0)) - upright).abs().mean() < 0.1
    assert (decode_image(jpeg, SIZE, (0, 0, 0)) - upright).abs().mean() < 2


@pytest.mark.parametrize("data", [b"", b"\xff\xd8", b"no image at all", photo_like_jpeg(0)[:3000]])
def test_what_is_no_image_is_an_error(data: bytes) -> None:
    with pytest.raises(DataError, match=rf"an image of {len(data)} bytes cannot be decoded"):
        decode_image(data, SIZE, None)


def test_normalize_gives_the_dtype_asked_for() -> None:
    pixels = torch.from_numpy(np.random.default_rng(0).integers(0, 256, (2, 3, 4, 4), dtype=np.uint8))
    values = normalize(pixels, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4), torch.bfloat16)
    expected = (pixels / 255 - torch.tensor((0.5, 0.4, 0.3)).view(3, 1, 1)) / torch.tensor((0.2, 0.3, 0.4)).view(
        3, 1, 1
    )
    assert values.dtype == torch.bfloat16
    torch.testing.assert_close(values.float(), expected, atol=0.01, rtol=0.01)
