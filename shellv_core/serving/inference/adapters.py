"""Several LoRA adapters over one base model, unmerged, so that one batch can mix them.

PEFT applies an adapter to each sequence of a batch when a layer is told their names. The layers are told through
hooks that are set once; the names change with every batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shellv_core.errors import ModelError
from shellv_core.serving.engine import AdapterInfo

#: PEFT's word for no adapter.
BASE = "__base__"


class AdapterSet:
    """Puts adapters on a model, in place, and says which of them the next forward pass uses.

    Used by one thread at a time.

    Args:
        model: the base model.
        directories: adapters by name, as finetune writes them.
        revisions: SHA-256 over each adapter's files.

    Raises:
        ModelError: if an adapter does not fit the model, or brings its own copy of a part of the language model.
    """

    def __init__(
        self, model: Any, directories: Mapping[str, Path] | None = None, revisions: Mapping[str, str] | None = None
    ) -> None:
        directories = directories or {}
        self.infos = tuple(AdapterInfo(name, (revisions or {}).get(name, "")) for name in directories)
        #: Adapters that change image features.
        self.changing_images: frozenset[str] = frozenset()
        self._names: list[str] | None = None
        self._enabled = False
        self._layers: list[Any] = []
        self._wrappers: list[Any] = []
        self._mixable = True
        if directories:
            self._load(model, directories)

    def _load(self, model: Any, directories: Mapping[str, Path]) -> None:
        from peft.tuners.lora import LoraLayer
        from peft.utils.other import ModulesToSaveWrapper

        from shellv_core.models.lora import load_adapter

        adapted = model
        for name, directory in directories.items():
            adapted = load_adapter(adapted, directory, name)
        changing = set()
        for path, module in model.named_modules():
            of_text = ".language_model." in f".{path}." or path.startswith("lm_head")
            if isinstance(module, LoraLayer):
                self._layers.append(module)
                changing |= set() if of_text else set(module.lora_A)
                # PEFT mixes plain LoRA only.
                self._mixable &= not module.lora_variant
                module.register_forward_pre_hook(self._tell, with_kwargs=True)  # type: ignore[attr-defined]
            elif isinstance(module, ModulesToSaveWrapper):
                if of_text:
                    raise ModelError(
                        f"an adapter brings its own {path}, which cannot be mixed with others; merge it (shellv"
                        " merge_lora) and serve the result."
                    )
                self._wrappers.append(module)
                changing |= set(module.modules_to_save)
        self.changing_images = frozenset(changing)
        self._activate(None)

    def batches(self, names: Sequence[str | None]) -> list[list[int]]:
        """Indices of the sequences that one forward pass can take together."""
        if self._mixable:
            return [list(range(len(names)))]
        return [[index for index, each in enumerate(names) if each == name] for name in dict.fromkeys(names)]

    @contextlib.contextmanager
    def together(self, names: Sequence[str | None]) -> Iterator[None]:
        """Within it, the language model applies to each sequence of a batch its own adapter (None for none).

        `names` are those of one of `batches`.
        """
        if not self._layers:
            yield
            return
        if not self._mixable:
            with self.alone(names[0]):
                yield
            return
        if not self._enabled:
            for layer in self._layers:
                layer.enable_adapters(True)
            self._enabled = True
        self._names = [name or BASE for name in names]
        try:
            yield
        finally:
            self._names = None

    @contextlib.contextmanager
    def alone(self, name: str | None) -> Iterator[None]:
        """Within it, the whole model computes with one adapter, or with none."""
        if self._layers or self._wrappers:
            self._activate(name)
        yield

    def _activate(self, name: str | None) -> None:
        self._enabled = False
        for module in [*self._layers, *self._wrappers]:
            held = module.modules_to_save if module in self._wrappers else module.lora_A
            module.enable_adapters(name in held)
            if name in held:
                module.set_adapter(name, inference_mode=True)

    def _tell(
        self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, kwargs if self._names is None else {**kwargs, "adapter_names": self._names}
