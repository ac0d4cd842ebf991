"""``shellv votes``: count the votes of the chat page's arena, or write them as preference data."""

from __future__ import annotations

import argparse
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is done with which votes."""
    verbs = parser.add_subparsers(dest="action", metavar="ACTION", required=True)
    show = verbs.add_parser("show", help="print the models' ratings")
    export = verbs.add_parser(
        "export", help="write votes with a picture as rows that prepare_data reads as a llava source"
    )
    export.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="an empty folder, or a new one")
    for each in (show, export):
        each.add_argument(
            "--votes", type=Path, metavar="FOLDER", help="where they are (default: page/votes in the project folder)"
        )


def main(args: argparse.Namespace) -> int:
    """Do it; returns the exit code.

    Raises:
        ServingError: if the votes cannot be read, or the output cannot be written.
    """
    from shellv_core.errors import ServingError
    from shellv_core.serving.page.preferences import export
    from shellv_core.serving.page.ratings import rate
    from shellv_core.serving.page.votes import VoteLog, votes_folder

    log = VoteLog(args.votes or votes_folder())
    if not log.files():
        raise ServingError(f"there are no votes in {log.folder}; they come from the arena of `shellv serve`.")
    if args.action == "show":
        print(f"{'rating':>6}  {'95 % interval':>13}  {'votes':>5}  {'wins':>4}  model")
        for each in rate([vote.battle for vote in log.read()]):
            interval = f"{each.low:.0f} - {each.high:.0f}"
            print(f"{each.points:6.0f}  {interval:>13}  {each.votes:5}  {each.win_share:4.0%}  {each.model}")
        return 0
    counts = export(log, args.output)
    for reason, count in counts.most_common():
        print(f"{count:6}  {reason}")
    if not counts["written"]:
        raise ServingError(f"none of the votes in {log.folder} is a preference between answers about a picture.")
    return 0
