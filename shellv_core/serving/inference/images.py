"""Image features, kept for pictures that come again."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING, Any

from shellv_core.serving.inference.adapters import AdapterSet
from shellv_core.serving.inference.job import Counters
from shellv_core.serving.prompt import PromptImage

if TYPE_CHECKING:
    import torch


class ImageFeatures:
    """Runs vision tower and projector, and remembers the last results within a bound of bytes.

    Features belong to the pixel values and to the adapter that changes them: two adapters may bring projectors of
    their own.

    Args:
        model: a LLaVA model of transformers.
        max_bytes: of all features together; the least recently used are dropped first.
    """

    def __init__(self, model: Any, adapters: AdapterSet, counters: Counters, max_bytes: int) -> None:
        self._model, self._adapters, self._counters, self._max_bytes = model, adapters, counters, max_bytes
        self._features: OrderedDict[tuple[str, str | None], torch.Tensor] = OrderedDict()
        self._bytes = 0

    def known(self, image: PromptImage, adapter: str | None) -> bool:
        """Whether `get` has the features without computing them."""
        return self._key(image, adapter) in self._features

    def get(self, image: PromptImage, adapter: str | None) -> torch.Tensor:
        """Features [num_tokens, hidden size] under `adapter`."""
        key = self._key(image, adapter)
        if key in self._features:
            self._features.move_to_end(key)
            self._counters.image_hits += 1
            return self._features[key]
        self._counters.image_misses += 1
        pixel_values = image.pixel_values.to(self._model.device, self._model.dtype)
        with self._adapters.alone(adapter):
            output = self._model.model.get_image_features(pixel_values=pixel_values, return_dict=True)
        features: torch.Tensor = output.pooler_output[0]
        self._features[key] = features
        self._bytes += features.nbytes
        while self._bytes > self._max_bytes:
            self._bytes -= self._features.popitem(last=False)[1].nbytes
        return features

    def clear(self) -> None:
        """Forget all."""
        self._features.clear()
        self._bytes = 0

    def _key(self, image: PromptImage, adapter: str | None) -> tuple[str, str | None]:
        return image.sha256, adapter if adapter in self._adapters.changing_images else None
