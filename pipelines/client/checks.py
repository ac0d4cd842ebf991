"""What a check of ``doctor`` is, and how one that cannot be made is told from one that fails."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from shellv_core.errors import ShellVError


@dataclass(frozen=True)
class Check:
    """What a check found.

    Attributes:
        name: what was looked at.
        status: ``ok``, ``failed``, or ``not checked`` where something that it needs is not in reach from here.
        detail: what was seen.
        remedy: what to do; empty where all is well.
    """

    name: str
    status: Literal["ok", "failed", "not checked"]
    detail: str
    remedy: str = ""


class NotChecked(Exception):
    """A check needs something that is not in reach; `remedy` says how to bring it there."""

    def __init__(self, why: str, remedy: str = "") -> None:
        super().__init__(why)
        self.remedy = remedy


class Failed(ShellVError):
    """A check failed; `remedy` says what to do."""

    def __init__(self, why: str, remedy: str) -> None:
        super().__init__(why)
        self.remedy = remedy


def checked(name: str, look: Callable[[], str]) -> Check:
    """The result of ``look()``, which returns what it saw or raises."""
    try:
        return Check(name, "ok", look())
    except NotChecked as error:
        return Check(name, "not checked", str(error), error.remedy)
    except Failed as error:
        return Check(name, "failed", str(error), error.remedy)
    except ShellVError as error:
        what, _, remedy = str(error).partition(". ")
        return Check(name, "failed", what, remedy or what)
