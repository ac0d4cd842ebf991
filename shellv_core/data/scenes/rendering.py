"""Scenes as pixels: backgrounds by place and time of day, tinted and turned artwork, soft shadows."""

from __future__ import annotations

import functools
import io
import random
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from shellv_core.data.scenes.artwork import FOLDER
from shellv_core.data.scenes.vocabulary import COLORS

if TYPE_CHECKING:
    from shellv_core.data.scenes.scene import Instance, Scene

Pixels = NDArray[np.int16]  # H x W x 3, 0..255

_SKIES = {  # top and horizon colors by day
    "blue": ((96, 158, 226), (206, 228, 244)),
    "gray": ((150, 160, 172), (214, 218, 222)),
    "evening": ((112, 110, 170), (250, 190, 130)),
}
_GROUNDS = {  # far and near colors
    "grass": ((120, 160, 84), (70, 120, 48)),
    "beach": ((236, 218, 172), (206, 178, 124)),
    "road": ((136, 136, 140), (84, 84, 90)),
    "snow": ((236, 242, 250), (206, 216, 232)),
    "floor": ((190, 146, 98), (140, 96, 58)),
    "carpet": ((168, 150, 160), (118, 100, 116)),
}
_WALLS = ((226, 214, 196), (196, 212, 220), (216, 222, 200), (228, 204, 200), (206, 204, 214))
_INDOORS = {"floor", "carpet"}
_NUM_NOISES = 12


def render_jpeg(scene: Scene, size: int, quality: int) -> bytes:
    """Render `scene` as a square JPEG of `size` pixels; the same scene gives the same bytes (with the same Pillow)."""
    buffer = io.BytesIO()
    render(scene, size).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def render(scene: Scene, size: int) -> Image.Image:
    """Render `scene` as an RGB image of `size` x `size` pixels."""
    rng = random.Random(scene.background_seed)
    image = Image.fromarray(_background(scene.place, scene.night, size, rng))
    colors = {item.category: item.color for item in scene.objects}
    for instance in sorted(scene.instances, key=lambda item: item.center_y + item.size / 2):
        _draw(image, instance, colors[instance.category], size)
    return image


def _draw(image: Image.Image, instance: Instance, color: str | None, size: int) -> None:
    sprite = _sprite(instance.picture, color, round(instance.size * size / 2) * 2, instance.flipped)
    turned = sprite.rotate(instance.tilt, Image.Resampling.BILINEAR, expand=True)
    left = round(instance.center_x * size - turned.width / 2)
    top = round(instance.center_y * size - turned.height / 2)
    if instance.center_y + instance.size / 2 > 0.5:
        shadow = _shadow(turned.width)
        image.paste((0, 0, 0), (left, top + turned.height - (shadow.height * 3) // 4), shadow)
    image.paste(turned, (left, top), turned)


@functools.lru_cache(maxsize=256)
def _shadow(width: int) -> Image.Image:
    """An L mask of a soft flat ellipse, `width` pixels wide."""
    height = max(4, width // 4)
    y, x = np.ogrid[-1 : 1 : height * 1j, -1 : 1 : width * 1j]
    strength = np.clip(1 - np.sqrt(x * x + y * y), 0, 1) * 120
    return Image.fromarray(strength.astype(np.uint8))


@functools.lru_cache(maxsize=8192)
def _sprite(picture: str, color: str | None, longer_side: int, flipped: bool) -> Image.Image:
    source = _tinted(picture, color)
    scale = longer_side / max(source.size)
    shape = (max(1, round(source.width * scale)), max(1, round(source.height * scale)))
    sprite = source.resize(shape, Image.Resampling.BILINEAR)
    return sprite.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if flipped else sprite


@functools.cache
def _tinted(picture: str, color: str | None) -> Image.Image:
    """Load a picture and give its colored parts one hue; wheels, windows and other gray parts keep theirs."""
    with Image.open(FOLDER / picture) as opened:
        image = opened.convert("RGBA")
    if color is None:
        return image
    pixels = np.asarray(image, np.float32)
    rgb, alpha = pixels[..., :3], pixels[..., 3:]
    saturation = rgb.max(-1, keepdims=True) - rgb.min(-1, keepdims=True)
    light = rgb @ np.array([0.299, 0.587, 0.114], np.float32)[:, None]
    visible = alpha[..., 0] > 128
    weight = np.clip(saturation / 60 - 0.4, 0, 1)
    if weight[visible].mean() < 0.35:
        weight = np.ones_like(weight)
    middle = float(np.median(light[visible & (weight[..., 0] > 0.5)]))
    tint = np.array(COLORS[color], np.float32)
    dark = tint * np.clip(light / middle, 0, 1)
    bright = np.clip((light - middle) / max(1.0, 255 - middle), 0, 1)
    recolored = dark + (255 - dark) * bright * 0.6
    blended = rgb * (1 - weight) + recolored * weight
    return Image.fromarray(np.concatenate([blended, alpha], -1).clip(0, 255).astype(np.uint8))


def _background(place: str, night: bool, size: int, rng: random.Random) -> NDArray[np.uint8]:
    horizon = round(size * rng.uniform(0.38, 0.56))
    pixels = np.empty((size, size, 3), np.int16)
    if place in _INDOORS:
        wall = np.array(rng.choice(_WALLS))
        shade = rng.uniform(0.8, 1.0)
        pixels[:horizon] = _gradient(wall, wall * shade, horizon)
    else:
        top, bottom = (np.array(color) for color in _SKIES[rng.choice(list(_SKIES))])
        pixels[:horizon] = _gradient(top, bottom, horizon)
        _add_skyline(pixels, horizon, place, rng)
    far, near = (np.array(color) for color in _GROUNDS[place])
    if place == "carpet":
        far, near = (np.roll(color, rng.randrange(3)) for color in (far, near))
    pixels[horizon:] = _gradient(far, near, size - horizon)
    _add_ground_lines(pixels, horizon, place, rng)

    blotches = _noise(size, "coarse", rng)
    grain = _noise(size, "fine", rng)
    pixels += blotches // (3 if place in _INDOORS else 2)
    pixels[horizon:] += grain[horizon:]
    pixels[:horizon] += grain[:horizon] // 4
    brightness = rng.uniform(0.88, 1.08)
    if night:
        pixels = (pixels * (np.array([0.4, 0.44, 0.6]) * brightness)).astype(np.int16)
        if place not in _INDOORS:
            for _ in range(14):
                pixels[rng.randrange(max(1, horizon - size // 8)), rng.randrange(size)] = 230
    else:
        pixels = (pixels * brightness).astype(np.int16)
    return np.clip(pixels, 0, 255).astype(np.uint8)


def _gradient(top: NDArray[np.number], bottom: NDArray[np.number], height: int) -> NDArray[np.int16]:
    return np.linspace(top, bottom, height, dtype=np.float32)[:, None, :].astype(np.int16)


def _add_skyline(pixels: Pixels, horizon: int, place: str, rng: random.Random) -> None:
    """Draw houses behind a road, sea behind a beach, hills behind grass and snow."""
    size = pixels.shape[1]
    if place == "beach":
        depth = round(size * rng.uniform(0.05, 0.12))
        pixels[horizon - depth : horizon] = (48, 122, 166)
    elif place == "road":
        left = 0
        while left < size:
            width = round(size * rng.uniform(0.08, 0.2))
            height = round(size * rng.uniform(0.06, 0.24))
            gray = rng.randrange(120, 190)
            pixels[horizon - height : horizon, left : left + width] = (gray, gray - 8, gray - 14)
            left += width
    else:
        base = np.array((96, 130, 104) if place == "grass" else (196, 206, 224), np.int16)
        columns = np.arange(size) / size
        wave = np.sin(columns * rng.uniform(5, 9) + rng.uniform(0, 6)) + np.sin(columns * rng.uniform(11, 17))
        heights = (size * 0.03 * (2.2 + wave)).astype(int)
        rows = np.arange(horizon)[:, None]
        pixels[:horizon][rows >= horizon - heights[None, :]] = base


def _add_ground_lines(pixels: Pixels, horizon: int, place: str, rng: random.Random) -> None:
    size = pixels.shape[1]
    if place == "floor":
        for row in range(horizon, size, max(4, size // 14)):
            pixels[row : row + 1] -= 26
        for column in range(rng.randrange(size // 4), size, size // 4):
            pixels[horizon:, column : column + 1] -= 16
    elif place == "road":
        row = horizon + round((size - horizon) * rng.uniform(0.4, 0.6))
        thickness = max(2, size // 60)
        dash = size // 8
        for column in range(rng.randrange(dash), size, dash * 2):
            pixels[row : row + thickness, column : column + dash] = 224
        pixels[horizon : horizon + thickness * 2] += 30


@functools.lru_cache(maxsize=4)
def _noise_bank(size: int, kind: str) -> Pixels:
    """Noise tiles, `_NUM_NOISES` x 2 size x 2 size x 3, around 0, from which windows are cut."""
    generator = np.random.default_rng(20_231_129)
    tiles = []
    for _ in range(_NUM_NOISES):
        if kind == "fine":
            tile = generator.normal(0, 9, (2 * size, 2 * size, 1)).repeat(3, axis=-1)
        else:
            gray = generator.integers(84, 172, (10, 10, 1))
            small = (gray + generator.integers(-10, 11, (10, 10, 3))).astype(np.uint8)
            tile = np.asarray(Image.fromarray(small).resize((2 * size, 2 * size), Image.Resampling.BICUBIC)) - 128.0
        tiles.append(tile.astype(np.int16))
    return np.stack(tiles)


def _noise(size: int, kind: str, rng: random.Random) -> Pixels:
    tile = _noise_bank(size, kind)[rng.randrange(_NUM_NOISES)]
    top, left = rng.randrange(size), rng.randrange(size)
    return tile[top : top + size, left : left + size]
