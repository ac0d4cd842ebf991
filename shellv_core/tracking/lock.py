"""One process at a time changes what a registered model's aliases name.

MLflow has no transactions over several calls, and one call alone that no two processes can both succeed with: making a
registered model of a name. So the lock of the model ``NAME`` is a registered model ``NAME.lock``, which is there for
the moments that an alias moves. One that was left by a process that was killed is removed by the next.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import time
import uuid
from collections.abc import Callable, Iterator

from shellv_core.errors import TrackingError
from shellv_core.logs import get_logger
from shellv_core.tracking.registry import LOCK_SUFFIX
from shellv_core.tracking.runs import NOT_FOUND, open_client

HOLDER_TAG = "shellv.holder"
STALE_SECONDS = 60.0  # a holder needs about one
PATIENCE_SECONDS = 600.0

logger = get_logger(__name__)


@contextlib.contextmanager
def exclusive(name: str) -> Iterator[Callable[[], None]]:
    """Hold the lock of the registered model `name`.

    Gives a function to call before a write that must not come late: it raises if the lock was taken away.

    A holder that is waited for longer than `STALE_SECONDS` counts as dead.

    Raises:
        TrackingError: if others hold the lock all the time, or it was taken away.
    """
    from mlflow.exceptions import MlflowException

    client, lock = open_client(), name + LOCK_SUFFIX
    me = f"{socket.gethostname()}:{os.getpid()}:{uuid.uuid4().hex}"

    def holder() -> str | None:
        try:
            return client.get_registered_model(lock).tags.get(HOLDER_TAG)
        except MlflowException as error:
            if error.error_code in NOT_FOUND:
                return None
            raise TrackingError(f"the lock {lock!r} cannot be read in MLflow: {error}") from None

    def check() -> None:
        if holder() != me:
            raise TrackingError(
                f"the lock of the model {name!r} was taken away, because this process did not let go of it for"
                f" {STALE_SECONDS:g} s. Nothing was changed since; run this again."
            )

    def release() -> None:
        # Another process may just have removed it as stale.
        with contextlib.suppress(MlflowException, TrackingError):
            if holder() == me:
                client.delete_registered_model(lock)

    seen: str | None = None
    started = seen_since = time.monotonic()
    while True:
        try:
            client.create_registered_model(
                lock, tags={HOLDER_TAG: me}, description="Held while an alias moves; gone in a moment."
            )
            break
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise TrackingError(f"the model {name!r} cannot be locked in MLflow: {error}") from None
        now, current = time.monotonic(), holder()
        if now - started > PATIENCE_SECONDS:
            raise TrackingError(
                f"the model {name!r} is being changed by {current}. Run this again when it is done; if that process"
                f" is gone, delete the registered model {lock!r} in MLflow."
            )
        if current != seen:
            seen, seen_since = current, now
            logger.info("waiting for %s to let go of the model %r", current, name)
        elif current is not None and now - seen_since > STALE_SECONDS:
            logger.warning("removing the lock of %r, which %s has held for %.0f s", name, current, STALE_SECONDS)
            with contextlib.suppress(MlflowException):
                if holder() == current:
                    client.delete_registered_model(lock)
        time.sleep(random.uniform(0.05, 0.25))
    try:
        yield check
    finally:
        release()
