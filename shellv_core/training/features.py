"""Features of the frozen vision tower: cached on disk, or computed when a batch asks for them.

Both give the same numbers. The cache is worth its space where the language model is small or epochs are many; its key
is the content of the data, the tower's weights and the image processor's settings, so stages share it.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from shellv_core.errors import DataError
from shellv_core.progress import Progress
from shellv_core.storage import home

if TYPE_CHECKING:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

TOWER_BATCH = 8
IMAGES_PER_FILE = 512
TENSOR_NAME = "features"


class ImageFeatures(Protocol):
    """Where batches get image features from."""

    def gather(self, images: np.ndarray) -> torch.Tensor:
        """The features of `images`: (len(images), num_image_tokens, vision hidden size)."""


class CachedFeatures:
    """Features of all images in memory, (M, num_image_tokens, vision hidden size)."""

    def __init__(self, features: torch.Tensor) -> None:
        self.features = features

    def gather(self, images: np.ndarray) -> torch.Tensor:
        """See `ImageFeatures`."""
        return self.features[torch.from_numpy(images)]


class LiveFeatures:
    """Images in one local file; each batch decodes its own and runs the tower."""

    def __init__(
        self,
        images: Iterable[bytes],
        path: Path,
        model: LlavaForConditionalGeneration,
        processor: LlavaProcessor,
    ) -> None:
        self.path, self.model, self.processor = path, model, processor
        self.offsets = [0]
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}.tmp")
        with unfinished.open("wb") as file:
            for image in images:
                file.write(image)
                self.offsets.append(self.offsets[-1] + len(image))
        # Several processes may have the same file.
        unfinished.replace(path)

    def gather(self, images: np.ndarray) -> torch.Tensor:
        """See `ImageFeatures`."""
        with self.path.open("rb") as file:
            encoded = []
            for image in images:
                file.seek(self.offsets[image])
                encoded.append(file.read(self.offsets[image + 1] - self.offsets[image]))
        batches = pixel_batches(iter(encoded), self.processor)
        return torch.cat([tower_features(self.model, batch) for batch in batches])


def tower_features(model: LlavaForConditionalGeneration, pixel_values: torch.Tensor) -> torch.Tensor:
    """What LLaVA's projector reads of `pixel_values` (n, 3, height, width): (n, num_image_tokens, vision hidden size).

    Source: transformers ``LlavaModel.get_image_features``, for one feature layer.
    """
    tower = model.model.vision_tower
    with torch.no_grad():
        pixel_values = pixel_values.to(tower.device, tower.dtype)
        hidden_states = tower(pixel_values, output_hidden_states=True).hidden_states[model.config.vision_feature_layer]
        return hidden_states[:, 1:] if model.config.vision_feature_select_strategy == "default" else hidden_states


def pixel_batches(
    images: Iterator[bytes], processor: LlavaProcessor, size: int = TOWER_BATCH
) -> Iterator[torch.Tensor]:
    """Decode and preprocess encoded images into batches (up to `size`, 3, height, width).

    Raises:
        DataError: if an image cannot be decoded.
    """
    from PIL import Image, UnidentifiedImageError

    index = 0
    while chunk := list(islice(images, size)):
        pictures = []
        for encoded in chunk:
            try:
                pictures.append(Image.open(io.BytesIO(encoded)).convert("RGB"))
            except (UnidentifiedImageError, OSError, Image.DecompressionBombError) as error:
                raise DataError(f"image {index} ({len(encoded)} bytes) cannot be decoded: {error}.") from error
            index += 1
        yield processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]


def cached_features(
    images: Callable[[], Iterable[bytes]],
    num_images: int,
    data_identity: str,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    dtype: torch.dtype,
) -> CachedFeatures:
    """Features of all images, from the cache or computed into it.

    The work is cut into files of 512 images, so a run that was killed goes on where it stopped.

    Args:
        images: opens the images from the start.
        data_identity: hash of what `images` yields.
        dtype: of the stored features; bfloat16 is exact where the projector computes in bfloat16 anyway.
    """
    folder = home() / "cache" / "features" / features_key(data_identity, model, processor, dtype)
    folder.mkdir(parents=True, exist_ok=True)
    starts = range(0, num_images, IMAGES_PER_FILE)
    paths = [folder / f"{start:08d}.safetensors" for start in starts]
    done = next((index for index, path in enumerate(paths) if not path.exists()), len(paths))
    if done < len(paths):
        remaining = islice(iter(images()), done * IMAGES_PER_FILE, None)
        with Progress(num_images, "vision features", "images", initial=done * IMAGES_PER_FILE) as counter:
            for path in paths[done:]:
                _write_features(path, islice(remaining, IMAGES_PER_FILE), model, processor, dtype, counter)
    parts = [load_file(path)[TENSOR_NAME] for path in paths]
    features = torch.cat(parts) if parts else torch.zeros(0, 0, 0, dtype=dtype)
    if len(features) != num_images:
        raise DataError(f"{folder} holds features of {len(features)} images, the data has {num_images}; delete it.")
    return CachedFeatures(features)


def features_key(
    data_identity: str, model: LlavaForConditionalGeneration, processor: LlavaProcessor, dtype: torch.dtype
) -> str:
    """Hash (16 hex digits) of everything that the features depend on."""
    digest = hashlib.sha256()
    settings = [
        data_identity,
        model.config.vision_feature_layer,
        model.config.vision_feature_select_strategy,
        processor.image_processor.to_dict(),
        str(dtype),
    ]
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    for name, tensor in sorted(model.model.vision_tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _write_features(
    path: Path,
    images: Iterator[bytes],
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    dtype: torch.dtype,
    counter: Progress,
) -> None:
    parts = []
    for pixel_values in pixel_batches(images, processor):
        parts.append(tower_features(model, pixel_values).to("cpu", dtype))
        counter.update(len(pixel_values))
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    save_file({TENSOR_NAME: torch.cat(parts).contiguous()}, unfinished)
    unfinished.replace(path)
