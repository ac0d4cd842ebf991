"""``shellv serve``: one model behind an OpenAI-compatible API, with a chat page."""

from __future__ import annotations

import argparse

DEFAULT_PORT = 8000
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is served and where."""
    parser.add_argument(
        "--model",
        required=True,
        metavar="REFERENCE",
        help="a model directory, the s3:// or file:// address of a merge_lora output, or models:/NAME@ALIAS",
    )
    parser.add_argument("--name", help="model id for clients (default: the reference's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port, 0 for a free one (default: %(default)s)")
    parser.add_argument("--device", default="cpu", help="where the model runs, for example cuda (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="number format (default: %(default)s)")
    parser.add_argument("--no-ui", action="store_true", help="serve the API without the chat page")
    parser.add_argument(
        "--until-stdin-closes", action="store_true", help="stop when the standard input ends, as it does with a parent"
    )


def main(args: argparse.Namespace) -> int:
    """Serve until a signal comes; returns the exit code.

    Raises:
        ShellVError: if the endpoint cannot start.
    """
    from shellv_core.serving.server import ServeConfig, serve

    config = ServeConfig(
        model=args.model,
        name=args.name,
        host=args.host,
        port=args.port,
        ui=not args.no_ui,
        device=args.device,
        dtype=args.dtype,
    )
    serve(config, until_stdin_closes=args.until_stdin_closes)
    return 0
