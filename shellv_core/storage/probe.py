"""Try out all that runs do with a place: put, get, upload in parts and delete a small object."""

from __future__ import annotations

import io
import uuid

from shellv_core.errors import IntegrityError
from shellv_core.storage.stores import S3Store, Store, _bucket, _key, join, open_store

#: The smallest part that S3 takes, but for the last.
PART_BYTES = 5 << 20


def probe(uri: str) -> None:
    """Put, get and delete an object of 5 MiB below `uri`, in two parts where the store has parts.

    Raises:
        StorageError: if one of them does not work.
    """
    store = open_store(uri)
    store.check(uri)
    place = join(uri, f".probe-{uuid.uuid4().hex}")
    try:
        for data in (b"probe", b"0" * (PART_BYTES + 1)):
            _put(store, place, data)
            if store.read_bytes(place) != data:
                raise IntegrityError(f"{uri} gives back other bytes than were put. Look at the object store's log.")
    finally:
        store.delete(place)


def _put(store: Store, uri: str, data: bytes) -> None:
    if not isinstance(store, S3Store) or len(data) <= PART_BYTES:
        store.write_bytes(uri, data)
        return
    from boto3.s3.transfer import TransferConfig

    parts = TransferConfig(multipart_threshold=PART_BYTES, multipart_chunksize=PART_BYTES, use_threads=False)
    with store._errors(uri):
        store._client.upload_fileobj(io.BytesIO(data), _bucket(uri), _key(uri), Config=parts)
