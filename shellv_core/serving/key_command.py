"""``shellv key``: make keys for ``shellv serve --keys FILE``."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare whose key is made and what it opens."""
    parser.description = (
        "A key opens the API (scope chat) or the operations port (scope admin) of `shellv serve --keys FILE`. The file"
        " holds hashes alone; to take a key back, delete its line and send the server SIGHUP."
    )
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    new = verbs.add_parser("new", help="print a new key once, and append its hash to a file")
    new.add_argument("--keys", type=Path, required=True, metavar="FILE", help="file of hashes, made where missing")
    new.add_argument("--name", required=True, help="who will hold the key; letters, digits, dot, dash, underscore")
    new.add_argument(
        "--scope",
        action="append",
        choices=("chat", "admin"),
        help="what the key opens: chat (the API), admin (commands of the operations port); repeat for both"
        " (default: chat)",
    )


def main(args: argparse.Namespace) -> int:
    """Make the key; returns the exit code.

    Raises:
        ServingError: if the name is taken or not a name, or the file cannot be written.
    """
    from shellv_core.errors import ServingError
    from shellv_core.serving.http.keys import LINE, new_key, read_keys

    secret, key = new_key(args.name, frozenset(args.scope or ["chat"]))
    if LINE.fullmatch(key.line()) is None:
        raise ServingError(f"--name {args.name!r} may have 64 letters, digits, dots, dashes and underscores.")
    if args.keys.exists() and any(each.name == args.name for each in read_keys(args.keys)):
        raise ServingError(f"{args.keys} holds a key of {args.name} already; take its line out first.")
    try:
        with os.fdopen(os.open(args.keys, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "a") as file:
            file.write(f"{key.line()}\n")
    except OSError as error:
        raise ServingError(f"cannot write {args.keys}: {error.strerror}.") from None
    print(secret)
    print(
        f"This key is shown once; {args.keys} keeps its hash. A running server takes it after SIGHUP.", file=sys.stderr
    )
    return 0
