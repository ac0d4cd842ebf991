"""The members of an uncompressed tar, with nothing lost in silence where it is damaged."""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import BinaryIO

from shellv_core.data.sources.blobs import Blob
from shellv_core.errors import DataError

_BLOCK_BYTES = 512
_COPY_BYTES = 1 << 20


def tar_members(blob: Blob, start: int = 0) -> Iterator[tuple[tarfile.TarInfo, BinaryIO]]:
    """Yield the files of a tar in order, each with the open tar, whose position is free to move.

    Args:
        blob: the tar.
        start: the `offset` of a member that was yielded before, 0 for all.

    Raises:
        DataError: if it is not an uncompressed tar, is cut off, or a header is damaged (Python's own reader takes a
            damaged header for the end). Members before the damage have been yielded by then.
    """
    with blob.open() as file:
        file.seek(start)
        try:
            with tarfile.open(fileobj=file, mode="r:") as tar:
                while (member := tar.next()) is not None:
                    tar.members = []  # type: ignore[attr-defined]  # else it keeps them all
                    if member.offset_data + member.size > blob.size:
                        raise DataError(
                            f"{blob.address} is cut off in member {member.name!r}: it has {blob.size} bytes,"
                            f" {member.offset_data + member.size} are needed. Fetch the file again."
                        )
                    if member.isreg():
                        yield member, file
                end = tar.offset
        except (tarfile.TarError, ValueError) as error:
            raise DataError(
                f"{blob.address} is no whole, uncompressed tar ({error}). Unpack a compressed one, or fetch it anew."
            ) from None
        _check_end(blob, file, end)


def _check_end(blob: Blob, file: BinaryIO, end: int) -> None:
    """From the end of the last member on there is at least one block, and only zeros."""
    if end + _BLOCK_BYTES > blob.size:
        raise DataError(
            f"{blob.address} is cut off: no end-of-archive block follows its last member at byte {end}. Fetch the file"
            " again."
        )
    file.seek(end)
    place = end
    while data := file.read(_COPY_BYTES):
        if data.count(0) != len(data):
            at = place + len(data) - len(data.lstrip(b"\0"))
            raise DataError(
                f"{blob.address} is damaged at byte {at}: neither a member nor the end stands there. Fetch the file"
                " again; tars that were joined must be given one by one."
            )
        place += len(data)
