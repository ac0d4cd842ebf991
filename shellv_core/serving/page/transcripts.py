"""Conversations as files for their owner, and stored ones behind signed addresses for whom he gives these to."""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
from pathlib import Path
from typing import Any

from shellv_core.config import Config
from shellv_core.errors import ServingError
from shellv_core.serving.page.turns import History

MAX_BYTES = 1 << 20
ADDRESS = re.compile(r"(?P<id>[A-Za-z0-9_-]{22})\.(?P<signature>[0-9a-f]{32})")


class Talk(Config):
    """One column: who answered, with what parameters, and what was said."""

    model: str
    options: dict[str, Any] = {}
    turns: tuple[dict[str, str], ...] = ()

    @classmethod
    def of(cls, model: str, options: dict[str, Any], history: History) -> Talk:
        """A talk from the page's own form."""
        return cls(model=model, options=options, turns=tuple(history))


class Transcript(Config):
    """What is exported and shared: talks about one picture, which is left out itself (`image` is its file's name)."""

    talks: tuple[Talk, ...]
    image: str | None = None

    def to_json(self) -> str:
        """As a file."""
        return self.model_dump_json(indent=1) + "\n"

    def to_markdown(self) -> str:
        """As a file for people; texts are quoted, so that nothing in them is taken for markup."""
        lines = ["# Shell-V", ""]
        if self.image:
            lines += [f"Picture: `{self.image}`", ""]
        for talk in self.talks:
            options = ", ".join(f"{name} {value}" for name, value in talk.options.items())
            lines += [f"## {talk.model}", "", *([options, ""] if options else [])]
            for turn in talk.turns:
                lines += [f"**{turn['role']}**", "", _fenced(turn["content"]), ""]
        return "\n".join(lines)

    def write(self, folder: Path) -> list[str]:
        """Write both files into `folder`; returns their paths."""
        paths = [folder / "conversation.json", folder / "conversation.md"]
        for path, text in zip(paths, (self.to_json(), self.to_markdown()), strict=True):
            path.write_text(text, encoding="utf-8")
        return [str(path) for path in paths]


def _fenced(text: str) -> str:
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}text\n{text}\n{fence}"


class Shares:
    """Transcripts that their owners have chosen to share, each below an address that cannot be guessed or made up.

    Args:
        folder: where they are, and the secret that signs their addresses; made at the first one.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def add(self, transcript: Transcript) -> str:
        """Store it; returns its address.

        Raises:
            ServingError: if it is too long, or the folder cannot be written.
        """
        data = transcript.to_json().encode()
        if len(data) > MAX_BYTES:
            raise ServingError(f"a conversation of {len(data)} bytes is too long to share; allowed are {MAX_BYTES}.")
        name = secrets.token_urlsafe(16)
        try:
            signature = self._signature(name)
            with os.fdopen(os.open(self._folder / name, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
                file.write(data)
        except OSError as error:
            raise ServingError(f"the conversation cannot be stored in {self._folder}: {error.strerror}.") from None
        return f"{name}.{signature}"

    def find(self, address: str) -> Transcript:
        """The transcript at `address`.

        Raises:
            ServingError: if there is none.
        """
        match = ADDRESS.fullmatch(address)
        with contextlib.suppress(OSError, ValueError):
            if match and hmac.compare_digest(self._signature(match["id"]), match["signature"]):
                return Transcript.model_validate(json.loads((self._folder / match["id"]).read_bytes()))
        raise ServingError("there is no shared conversation at this address.")

    def _signature(self, name: str) -> str:
        return hmac.digest(self._secret(), name.encode(), hashlib.sha256).hex()[:32]

    def _secret(self) -> bytes:
        path = self._folder / ".secret"
        with contextlib.suppress(FileNotFoundError):
            return path.read_bytes()
        self._folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        half = path.with_name(f".secret-{secrets.token_hex(8)}")
        with os.fdopen(os.open(half, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        # The first of two processes wins, and both sign with its secret.
        with contextlib.suppress(FileExistsError):
            os.link(half, path)
        half.unlink()
        return path.read_bytes()
