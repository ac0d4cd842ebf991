"""Keys: who may ask what. A file holds their hashes, one a line: ``NAME:SCOPE[,SCOPE]:SHA256``.

A key is 256 random bits, so a plain hash keeps it; what is hashed slowly elsewhere is what people think up.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, get_args

from shellv_core.errors import ServingError
from shellv_core.logs import get_logger

logger = get_logger(__name__)

Scope = Literal["chat", "admin"]
SCOPES: tuple[Scope, ...] = get_args(Scope)
PREFIX = "shellv-"
LINE = re.compile(r"(?P<name>[A-Za-z0-9._-]{1,64}):(?P<scopes>[a-z]+(?:,[a-z]+)*):(?P<sha256>[0-9a-f]{64})")


@dataclass(frozen=True)
class Key:
    """Who holds a key and what it opens: ``chat`` the API, ``admin`` the operations port's commands.

    `limited` is whether the limits of one holder hold for it.
    """

    name: str
    scopes: frozenset[str]
    sha256: str
    limited: bool = True

    def line(self) -> str:
        """As a file of keys holds it."""
        return f"{self.name}:{','.join(sorted(self.scopes))}:{self.sha256}"


def new_key(name: str, scopes: frozenset[str]) -> tuple[str, Key]:
    """A fresh secret for its holder, and what a file keeps of it."""
    secret = PREFIX + secrets.token_urlsafe(32)
    return secret, Key(name, scopes, _hash(secret))


class Keys:
    """The keys of a file.

    Args:
        path: the file.

    Raises:
        ServingError: if it cannot be read, or a line is not of the form.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._own: list[Key] = []
        self._keys = read_keys(path)

    def reload(self) -> None:
        """Read the file again; where it is faulty, say so and keep what holds now."""
        try:
            self._keys = read_keys(self.path)
        except ServingError as error:
            logger.error("%s The keys stay as they were.", error)
            return
        logger.info("%d keys from %s", len(self._keys), self.path)

    def add(self, name: str, scopes: frozenset[str]) -> str:
        """A secret that lives as long as this process, for a client inside it that stands for many people."""
        secret, key = new_key(name, scopes)
        self._own.append(replace(key, limited=False))
        return secret

    def find(self, secret: str) -> Key | None:
        """The key whose secret this is, in a time that does not tell which one came close."""
        digest = _hash(secret)
        found = None
        for key in (*self._keys, *self._own):
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


def read_keys(path: Path) -> list[Key]:
    """The keys of a file; empty lines and lines that begin with ``#`` say nothing.

    Raises:
        ServingError: if the file cannot be read, a line is not of the form, or a name stands twice.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(f"cannot read the keys in {path}: {getattr(error, 'strerror', error)}.") from None
    keys: dict[str, Key] = {}
    for number, line in enumerate(lines, 1):
        if not line.strip() or line.startswith("#"):
            continue
        match = LINE.fullmatch(line.strip())
        if match is None:
            # Not quoted: whoever pastes a key instead of its hash should not find it in a log.
            raise ServingError(f"{path}:{number} is not of the form NAME:SCOPE[,SCOPE]:SHA256; use `shellv key new`.")
        scopes = frozenset(match["scopes"].split(","))
        if scopes - set(SCOPES):
            unknown = ", ".join(sorted(scopes - set(SCOPES)))
            raise ServingError(f"{path}:{number} names the scope {unknown}; allowed: {', '.join(SCOPES)}.")
        if match["name"] in keys:
            raise ServingError(f"{path}:{number} names {match['name']} a second time.")
        keys[match["name"]] = Key(match["name"], scopes, match["sha256"])
    return list(keys.values())


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode(errors="surrogatepass")).hexdigest()
