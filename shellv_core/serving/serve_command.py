"""``shellv serve``: one model, or many, behind an OpenAI-compatible API, with a chat page."""

from __future__ import annotations

import argparse
from pathlib import Path

DEFAULT_PORT = 8000
DEFAULT_OPERATIONS_PORT = 8001
QUANTIZATIONS = ("nf4", "int8")
DTYPES = ("float32", "bfloat16", "float16")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what is served and where."""
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--model",
        metavar="REFERENCE",
        help="a model directory, the s3:// or file:// address of a merge_lora output, or models:/NAME@ALIAS, which is"
        " followed",
    )
    what.add_argument(
        "--config", type=Path, metavar="FILE", help="many models, as docs/serving.md describes; read again at SIGHUP"
    )
    parser.add_argument("--pin", action="store_true", help="keep the version that the alias names at the start")
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=REFERENCE",
        help="a LoRA adapter, served as a model NAME; repeat for more",
    )
    parser.add_argument("--name", help="model id for clients (default: the reference's name)")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="port, 0 for a free one (default: %(default)s)")
    parser.add_argument(
        "--operations-host", default="127.0.0.1", help="address for metrics, load and commands (default: %(default)s)"
    )
    parser.add_argument(
        "--operations-port",
        type=int,
        default=DEFAULT_OPERATIONS_PORT,
        help="their port, 0 for a free one (default: %(default)s)",
    )
    parser.add_argument(
        "--keys", type=Path, metavar="FILE", help="who may ask, made by `shellv key new`; read again at SIGHUP"
    )
    parser.add_argument("--open-to-all", action="store_true", help="allow other addresses than loopback without --keys")
    parser.add_argument(
        "--image-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch pictures by https from this host, or from *.DOMAIN; repeat for more (default: from nowhere)",
    )
    parser.add_argument(
        "--device", default="cpu", help="cuda, cuda:1, mps, or auto for all GPUs together (default: %(default)s)"
    )
    parser.add_argument("--quantization", choices=QUANTIZATIONS, help="hold the language model in 4 or 8 bits")
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
    from shellv_core.config import build_config
    from shellv_core.serving.http.config import ApiConfig, RequestLimits
    from shellv_core.serving.remote_images import RemoteImageConfig
    from shellv_core.serving.server import ServeConfig, serve

    remote = build_config(RemoteImageConfig, {"hosts": args.image_host})
    config = ServeConfig(
        models_file=args.config,
        model=args.model or "",
        follow=not args.pin,
        adapters=dict(_named(each) for each in args.adapter),
        quantization=args.quantization,
        name=args.name,
        host=args.host,
        port=args.port,
        operations_host=args.operations_host,
        operations_port=args.operations_port,
        keys=args.keys,
        open_to_all=args.open_to_all,
        api=ApiConfig(request=RequestLimits(remote_images=remote)),
        ui=not args.no_ui,
        device=args.device,
        dtype=args.dtype,
    )
    serve(config, until_stdin_closes=args.until_stdin_closes)
    return 0


def _named(text: str) -> tuple[str, str]:
    from shellv_core.errors import ConfigError

    name, separator, reference = text.partition("=")
    if not (name and separator and reference):
        raise ConfigError(f"--adapter {text!r} is not of the form NAME=REFERENCE.")
    return name, reference
