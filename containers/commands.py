"""Runs other programs: argument lists only, failures as errors that name the program."""

from __future__ import annotations

import subprocess
from collections.abc import Sequence

from shellv_core.errors import ShellVError


class CommandError(ShellVError):
    """A program that the project calls failed or is not there."""


def run(arguments: Sequence[str], timeout: float | None = None) -> None:
    """Run a program that shows its own output.

    Raises:
        CommandError: if it is not installed, fails, or is not done after `timeout` seconds.
    """
    _run(arguments, timeout, capture=False)


def output_of(arguments: Sequence[str], timeout: float | None = 120) -> str:
    """What a program writes to its standard output, without the space around it.

    Raises:
        CommandError: as in `run`, with the last lines of what it wrote to standard error.
    """
    return _run(arguments, timeout, capture=True).strip()


def succeeds(arguments: Sequence[str], timeout: float | None = 120) -> bool:
    """Whether a program ends with code 0."""
    try:
        output_of(arguments, timeout)
    except CommandError:
        return False
    return True


def _run(arguments: Sequence[str], timeout: float | None, capture: bool) -> str:
    try:
        done = subprocess.run(list(arguments), capture_output=capture, text=True, timeout=timeout, check=False)
    except FileNotFoundError:
        raise CommandError(f"{arguments[0]} is not installed.") from None
    except subprocess.TimeoutExpired:
        raise CommandError(f"`{' '.join(arguments[:3])}` was not done after {timeout:g} seconds.") from None
    if done.returncode:
        said = "\n".join((done.stderr or "").strip().splitlines()[-5:])
        raise CommandError(
            f"`{' '.join(arguments[:3])}` ended with code {done.returncode}" + (f":\n{said}" if said else ".")
        )
    return done.stdout or ""
