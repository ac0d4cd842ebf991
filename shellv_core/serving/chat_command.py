"""``shellv chat``: talk with a model about a picture in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import logging
from pathlib import Path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare whom to talk with and how."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model",
        metavar="REFERENCE",
        help="a model directory, the s3:// or file:// address of a merge_lora output, or models:/NAME@ALIAS",
    )
    source.add_argument("--url", help="an endpoint that runs already, for example http://127.0.0.1:8000")
    parser.add_argument("--image", type=Path, help="a picture (png, jpeg, webp or gif) for the first question")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 is greedy (default: %(default)s)")
    parser.add_argument("--top-p", type=float, default=1.0, help="share of likely tokens (default: %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="longest answer (default: what fits, up to 512)")
    parser.add_argument("--seed", type=int, help="makes a drawn answer repeatable")


def main(args: argparse.Namespace) -> int:
    """Chat until the input ends; 0 if every question was answered, else 1.

    Raises:
        ShellVError: if the model cannot be loaded or the endpoint does not answer.
    """
    from shellv_core.endpoint.client import EndpointClient
    from shellv_core.serving.chat import Chat

    options = {"temperature": args.temperature, "top_p": args.top_p}
    options |= {key: value for key in ("max_tokens", "seed") if (value := getattr(args, key)) is not None}
    with contextlib.ExitStack() as stack:
        url = args.url
        if url is None:
            # The server's own lines would stand between the answers.
            logging.getLogger("shellv_core.serving").setLevel(logging.WARNING)
            from shellv_core.serving.server import ServeConfig, background_server

            url = stack.enter_context(
                background_server(ServeConfig(model=args.model, follow=False, port=0, operations_port=None, ui=False))
            )
        return Chat(EndpointClient(url), args.image, options).run()
