"""Weights on disk, tensor by tensor: what a conversion reads and writes never lies in memory as a whole.

`Weights` maps names to tensors that are read when they are written. Renaming, slicing and joining them are functions of
such mappings, so that names and shapes are checked before the first byte is read.
"""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from shellv_core.errors import ModelError
from shellv_core.progress import progress

DTYPE_CODES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {code: dtype for dtype, code in DTYPE_CODES.items()}
#: Where a directory keeps its weights, in the order in which they are looked for.
INDEXES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
SINGLE_FILES = ("model.safetensors", "pytorch_model.bin")
MAX_SHARD_BYTES = 5_000_000_000
NAMED_FAULTS = 5


@dataclass(frozen=True)
class LazyTensor:
    """A tensor that is read on demand."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], torch.Tensor]

    @property
    def num_bytes(self) -> int:
        """Bytes of the values."""
        count = 1
        for size in self.shape:
            count *= size
        return count * self.dtype.itemsize


Weights = dict[str, LazyTensor]


def in_memory(tensor: torch.Tensor) -> LazyTensor:
    """A tensor that is there already."""
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda: tensor)


def rows(tensor: LazyTensor, start: int, stop: int) -> LazyTensor:
    """Rows `start` to `stop` of (rows, ...)."""
    return LazyTensor((stop - start, *tensor.shape[1:]), tensor.dtype, lambda: tensor.read()[start:stop])


def joined(tensors: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors of (rows_i, ...) one below the other: (sum of rows_i, ...)."""
    shape = (sum(tensor.shape[0] for tensor in tensors), *tensors[0].shape[1:])
    return LazyTensor(shape, tensors[0].dtype, lambda: torch.cat([tensor.read() for tensor in tensors]))


def has_weights(directory: Path) -> bool:
    """Whether `directory` holds a whole model's weights."""
    return any((directory / name).is_file() for name in (*INDEXES, *SINGLE_FILES))


def read_weights(path: Path) -> Weights:
    """The weights of a model directory (one file or shards with their index), or of a single file, in file order.

    Pickled files are read with torch's restricted unpickler: tensors alone, nothing is run.

    Raises:
        ModelError: if there are none, a file is damaged or holds anything but tensors, or the index and the files
            disagree.
    """
    if path.is_file():
        return _read_file(path, _PickledFiles())
    for name in INDEXES:
        if (path / name).is_file():
            return _read_shards(path, path / name)
    for name in SINGLE_FILES:
        if (path / name).is_file():
            return _read_file(path / name, _PickledFiles())
    raise ModelError(f"{path} holds no weights: none of {', '.join((*INDEXES, *SINGLE_FILES))} is there.")


def write_weights(
    weights: Weights, directory: Path, max_shard_bytes: int = MAX_SHARD_BYTES, file_name: str | None = None
) -> None:
    """Write `weights` as safetensors: as the one file `file_name`, or in shards with an index where one is too large.

    At any time one tensor is in memory, and the pages of the input that hold it.
    """
    if file_name is not None:
        _write_safetensors(directory / file_name, weights)
        return
    shards = _shards(weights, max_shard_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors" for number in range(len(shards))]
    for name, shard in zip(names, progress(shards, description="writing weights", unit="shards"), strict=True):
        _write_safetensors(directory / name, shard)
    if len(shards) > 1:
        index = {
            "metadata": {"total_size": sum(tensor.num_bytes for tensor in weights.values())},
            "weight_map": {key: name for name, shard in zip(names, shards, strict=True) for key in shard},
        }
        (directory / INDEXES[0]).write_text(json.dumps(index, indent=2), encoding="utf-8")


def write_pickle(weights: Weights, path: Path) -> None:
    """Write `weights` the way that ``torch.save`` of a state dict does."""
    torch.save({name: tensor.read().clone() for name, tensor in weights.items()}, path)


def require(weights: Weights, expected: Mapping[str, tuple[int, ...]], where: object) -> None:
    """Check that `weights` are exactly those of `expected`, a mapping of names to shapes.

    Raises:
        ModelError: listing what is missing, unexpected or of another shape.
    """
    wrong = [
        f"{name} is {weights[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in weights and weights[name].shape != tuple(shape)
    ]
    faults = {
        "missing": [name for name in expected if name not in weights],
        "unexpected": [name for name in weights if name not in expected],
        "wrong shape": wrong,
    }
    texts = [f"{len(names)} {kind}: {_first(names)}" for kind, names in faults.items() if names]
    if texts:
        raise ModelError(
            f"the weights in {where} are not those that its config describes; {'; '.join(texts)}. Nothing was written;"
            " give the complete checkpoint with the config that belongs to it."
        )


def _first(names: Sequence[str]) -> str:
    more = f" and {len(names) - NAMED_FAULTS} more" if len(names) > NAMED_FAULTS else ""
    return ", ".join(names[:NAMED_FAULTS]) + more


def _read_shards(directory: Path, index: Path) -> Weights:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        files = list(dict.fromkeys(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"{index} is no index of weights: {error!r}. Copy the checkpoint again.") from None
    strangers = [name for name in files if not isinstance(name, str) or Path(name).name != name]
    if strangers:
        raise ModelError(f"{index} names {strangers[0]!r}, which is no file beside it; only plain file names are read.")
    absent = [name for name in files if not (directory / name).is_file()]
    if absent:
        raise ModelError(f"{directory} lacks {len(absent)} of its {len(files)} shards: {_first(absent)}.")
    pickles = _PickledFiles()
    weights: Weights = {}
    for name in files:
        shard = _read_file(directory / name, pickles)
        listed = {key for key, file in weight_map.items() if file == name}
        if listed != set(shard):
            raise ModelError(
                f"{directory / name} and {index.name} disagree about {_first(sorted(listed ^ set(shard)))}. Copy the"
                " checkpoint again."
            )
        weights |= shard
    return weights


def _read_file(path: Path, pickles: _PickledFiles) -> Weights:
    if path.suffix != ".safetensors":
        return pickles.weights(path)
    try:
        with safe_open(path, framework="pt") as file:
            slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
            specs = {name: (tuple(each.get_shape()), each.get_dtype()) for name, each in slices.items()}
    except (SafetensorError, OSError) as error:
        raise ModelError(f"{path} is no safetensors file: {error}. Copy it again.") from None
    unknown = sorted({code for _, code in specs.values()} - set(DTYPES))
    if unknown:
        raise ModelError(f"{path} holds values of type {unknown[0]}; known are {', '.join(DTYPES)}.")
    return {
        name: LazyTensor(shape, DTYPES[code], _safetensors_reader(path, name)) for name, (shape, code) in specs.items()
    }


def _safetensors_reader(path: Path, name: str) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        # Opened for each tensor, so that its pages go when it goes.
        with safe_open(path, framework="pt") as file:
            return file.get_tensor(name)

    return read


class _PickledFiles:
    """The pickled files of a checkpoint, of which one at a time is open."""

    def __init__(self) -> None:
        self._path: Path | None = None
        self._tensors: dict[str, torch.Tensor] = {}

    def weights(self, path: Path) -> Weights:
        return {
            name: LazyTensor(tuple(tensor.shape), tensor.dtype, self._reader(path, name))
            for name, tensor in self._open(path).items()
        }

    def _reader(self, path: Path, name: str) -> Callable[[], torch.Tensor]:
        return lambda: self._open(path)[name]

    def _open(self, path: Path) -> dict[str, torch.Tensor]:
        if path != self._path:
            self._path, self._tensors = None, {}
            self._tensors = load_pickle(path)
            self._path = path
        return self._tensors


def load_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Read a pickled state dict, mapped into memory where its format allows, with torch's restricted unpickler.

    Raises:
        ModelError: if the file is damaged, or holds anything but tensors by name. Nothing in it is run.
    """
    try:
        try:
            content = torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except RuntimeError:
            # The format before torch 1.6 cannot be mapped.
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ModelError(
            f"{path} is refused: it holds more than tensors, and a pickle can run any program"
            f" ({str(error).splitlines()[0]}). Nothing was run. Get the weights as safetensors, or from a source that"
            " you trust."
        ) from None
    except (RuntimeError, EOFError, OSError, ValueError, KeyError) as error:
        raise ModelError(f"{path} is no readable PyTorch file: {str(error).splitlines()[0]} Copy it again.") from None
    if not isinstance(content, dict) or not all(
        isinstance(name, str) and isinstance(value, torch.Tensor) for name, value in content.items()
    ):
        raise ModelError(f"{path} holds {type(content).__name__}, but a mapping of names to tensors is expected.")
    return {name: value.detach() for name, value in content.items()}


def _shards(weights: Weights, max_shard_bytes: int) -> list[Weights]:
    shards: list[Weights] = [{}]
    size = 0
    for name, tensor in weights.items():
        if shards[-1] and size + tensor.num_bytes > max_shard_bytes:
            shards.append({})
            size = 0
        shards[-1][name] = tensor
        size += tensor.num_bytes
    return shards


def _write_safetensors(path: Path, weights: Weights) -> None:
    # By hand, as the library's writer takes all tensors of a file at once. Widest first keeps values aligned.
    ordered = dict(sorted(weights.items(), key=lambda item: -item[1].dtype.itemsize))
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, tensor in ordered.items():
        stop = offset + tensor.num_bytes
        header[name] = {
            "dtype": DTYPE_CODES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, stop],
        }
        offset = stop
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little"))
        file.write(text)
        for tensor in ordered.values():
            file.write(_value_bytes(tensor))


def _value_bytes(tensor: LazyTensor) -> Any:
    values = tensor.read()
    if tuple(values.shape) != tensor.shape or values.dtype != tensor.dtype:
        raise RuntimeError(f"announced {tensor.shape} of {tensor.dtype}, read {values.shape} of {values.dtype}")
    return values.contiguous().reshape(-1).view(torch.uint8).numpy()


def without(weights: Weights, names: Iterable[str]) -> Weights:
    """`weights` less `names`."""
    left_out = set(names)
    return {name: tensor for name, tensor in weights.items() if name not in left_out}
