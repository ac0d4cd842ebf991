"""The votes of the arena: JSON lines that are only ever added to, in files of bounded size, beside their pictures.

    votes/votes.jsonl                    where votes are added
    votes/votes-20260101T120000-1.jsonl  full ones
    votes/images/SHA256                  pictures that were asked about, each once

A line is written whole under a lock that all processes share, so that several gateways may use one folder.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, ValidationError

from shellv_core.config import Config
from shellv_core.errors import ServingError
from shellv_core.serving.page.ratings import Battle, Verdict
from shellv_core.storage.home import home

NAME = "votes.jsonl"
MAX_BYTES = 16 << 20


def page_folder() -> Path:
    """Where the page keeps votes and shared conversations by default."""
    return home() / "page"


def votes_folder() -> Path:
    """Where the page keeps votes by default."""
    return page_folder() / "votes"


class Side(Config):
    """One side of a battle.

    Attributes:
        model: the model's id.
        revision: SHA-256 of its weights.
        options: sampling parameters as in the API.
        answers: one for each question.
    """

    model: str
    revision: str = ""
    options: dict[str, Any] = {}
    answers: tuple[str, ...]


class Vote(Config):
    """A vote.

    Attributes:
        time: when, in UTC (ISO 8601).
        voter: from `Visitors.name`.
        verdict: which side was better.
        image: SHA-256 of the picture file, None where there was none.
        questions: what both sides were asked.
        left, right: the sides as they were shown.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    version: Literal[1] = 1
    time: str
    voter: str
    verdict: Verdict
    image: str | None = None
    questions: tuple[str, ...]
    left: Side
    right: Side

    @property
    def battle(self) -> Battle:
        """What ratings are made of."""
        return Battle(self.left.model, self.right.model, self.verdict)


class VoteLog:
    """The votes below `folder`, which is made at the first one.

    Args:
        folder: where they are.
        max_bytes: a file that has reached this size is put aside.
    """

    def __init__(self, folder: Path, max_bytes: int = MAX_BYTES) -> None:
        self.folder, self._max_bytes = folder, max_bytes

    def add(self, vote: Vote, image: bytes | None = None) -> None:
        """Store a vote and its picture.

        Raises:
            ServingError: if the folder cannot be written.
        """
        line = vote.model_dump_json().encode() + b"\n"
        try:
            self.folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            if image is not None:
                self._store(image)
            with self._locked():
                path = self.folder / NAME
                if path.exists() and path.stat().st_size >= self._max_bytes:
                    path.rename(self._aside())
                with _appending(path) as file:
                    os.write(file, line)
                    os.fsync(file)
        except OSError as error:
            raise ServingError(f"the vote cannot be stored in {self.folder}: {error.strerror}.") from None

    def read(self) -> Iterator[Vote]:
        """All votes, oldest file first; a line that a crash has left half is passed over.

        Raises:
            ServingError: if a whole line is no vote.
        """
        for path in self.files():
            with path.open(encoding="utf-8") as file:
                for number, line in enumerate(file, 1):
                    if not line.endswith("\n"):
                        continue
                    try:
                        yield Vote.model_validate_json(line)
                    except ValidationError as error:
                        fault = error.errors()[0]
                        raise ServingError(f"{path}:{number} is no vote: {fault['msg']}; take the line out.") from None

    def files(self) -> list[Path]:
        """The files of votes, oldest first."""
        aside = sorted(self.folder.glob("votes-*.jsonl"))
        return [*aside, *(path for path in [self.folder / NAME] if path.exists())]

    def image(self, name: str) -> Path:
        """Where the picture of that SHA-256 lies."""
        return self.folder / "images" / name

    def _store(self, image: bytes) -> None:
        path = self.image(image_name(image))
        if path.exists():
            return
        path.parent.mkdir(exist_ok=True)
        half = path.with_suffix(f".{os.getpid()}")
        half.write_bytes(image)
        half.rename(path)

    def _aside(self) -> Path:
        stamp = datetime.now(UTC).strftime("%Y%m%dT%H%M%S")
        number = 1
        while (path := self.folder / f"votes-{stamp}-{number}.jsonl").exists():
            number += 1
        return path

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        with _appending(self.folder / ".lock") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            yield


def image_name(image: bytes) -> str:
    """Under which a picture is stored."""
    return hashlib.sha256(image).hexdigest()


def now() -> str:
    """For `Vote.time`."""
    return datetime.now(UTC).isoformat(timespec="seconds")


@contextlib.contextmanager
def _appending(path: Path) -> Iterator[int]:
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    try:
        yield file
    finally:
        os.close(file)
