"""A name for a visitor that tells one from another within a day and nobody from whom it stands."""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Callable
from datetime import UTC, datetime


def _today() -> str:
    return datetime.now(UTC).date().isoformat()


class Visitors:
    """Names visitors by a hash of their address with a random salt that is kept in memory and lives for a day (UTC).

    When it is gone, not even whoever holds the votes can try addresses out.

    Args:
        today: tells the day; for tests.
    """

    def __init__(self, today: Callable[[], str] = _today) -> None:
        self._today, self._day, self._salt = today, "", b""

    def name(self, address: str) -> str:
        """16 hex digits for the visitor from `address`."""
        if (day := self._today()) != self._day:
            self._day, self._salt = day, secrets.token_bytes(32)
        return hmac.digest(self._salt, address.encode(), hashlib.sha256).hex()[:16]
