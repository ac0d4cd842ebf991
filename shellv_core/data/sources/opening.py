"""Opens a source by its settings."""

from __future__ import annotations

from typing import Any

from shellv_core.data.sources.base import Source
from shellv_core.data.sources.blobs import local
from shellv_core.data.sources.config import (
    CocoSource,
    FolderSource,
    HalEvalSource,
    LlavaSource,
    ParquetSource,
    SourceConfig,
    TsvSource,
)
from shellv_core.data.sources.images import archive_of
from shellv_core.errors import ShellVError
from shellv_core.storage import check_access, status

_ADDRESSES = frozenset({"annotations", "captions", "instances", "images", "folder", "files", "tars"})


def open_source(config: SourceConfig) -> Source:
    """Return the rows that `config` describes; it fetches, unpacks or lists what random access needs, once a machine.

    Raises:
        ConfigError: if a setting does not fit what it finds.
        DataError: if an address holds something else, or a file is damaged.
        StorageError: if the store refuses.
    """
    if isinstance(config, LlavaSource):
        from shellv_core.data.sources.llava import LlavaRows

        return LlavaRows(config)
    if isinstance(config, HalEvalSource):
        from shellv_core.data.sources.hal_eval import HalEvalRows

        return HalEvalRows(config)
    if isinstance(config, CocoSource):
        from shellv_core.data.sources.coco import CocoRows

        return CocoRows(config)
    if isinstance(config, TsvSource):
        from shellv_core.data.sources.tsv import TsvRows

        return TsvRows(config)
    if isinstance(config, FolderSource):
        from shellv_core.data.sources.folder import FolderRows

        return FolderRows(config)
    if isinstance(config, ParquetSource):
        from shellv_core.data.sources.parquet import ParquetRows

        return ParquetRows(config)
    from shellv_core.data.sources.web_dataset import WebDatasetRows

    return WebDatasetRows(config)


def is_remote(config: SourceConfig) -> bool:
    """Whether reading an image of `config` waits for a network."""
    addresses = (getattr(config, name, None) for name in ("images", "folder", "files", "tars"))
    return any(str(address).startswith("s3://") for address in addresses)


def faults(config: SourceConfig, where: str) -> list[str]:
    """Return a sentence for every address of `config` that cannot be used, within seconds and without opening it.

    Args:
        config: of the source.
        where: its key in the stage's settings, for example "llava".
    """
    found = []
    for name in type(config).model_fields:
        address: Any = getattr(config, name)
        if name in _ADDRESSES and address is not None:
            problem = _fault(name, address)
            found += [f"{where}.{name}={address!r}{problem}"] if problem else []
    return found


def _fault(name: str, address: str) -> str:
    """Return the rest of a sentence that begins with the setting, "" where nothing is wrong."""
    if not address:
        return " is empty; give a path or URI"
    is_file = name in ("annotations", "captions", "instances")
    try:
        archive, _, _ = archive_of(address) if name == "images" else ("", "", "")
        path = local(archive or address)
        if path is None:
            if archive or is_file:
                status(archive or address)
            else:
                check_access(address)
            return ""
    except ShellVError as error:
        return f": {error}"
    if is_file:
        return "" if path.is_file() else " is not a file; give the path of the rows"
    if archive:
        return "" if path.is_file() else ": there is no such archive"
    if name in ("images", "folder"):
        return "" if path.is_dir() else " is not a folder; give the one that the rows' image paths are relative to"
    return "" if path.exists() else " does not exist"
