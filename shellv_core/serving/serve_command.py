"""``shellv serve``: one model, or many, behind an OpenAI-compatible API, with a chat page."""

from __future__ import annotations

import argparse
from pathlib import Path

DEFAULT_PORT = 8000
DEFAULT_OPERATIONS_PORT = 8001
DTYPES = ("float32", "bfloat16", "float16")
QUANTIZATIONS = ("none", "nf4", "int8")
BATCHINGS = ("slots", "serial")


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
        "--config",
        type=Path,
        metavar="FILE",
        help="many models, as docs/serving.md describes, with all that is said of one here; read again at SIGHUP",
    )
    parser.add_argument("--pin", action="store_true", help="keep the version that the alias names at the start")
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
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=REFERENCE",
        help="a LoRA adapter beside the model, under an id of its own: its folder, or a finetune output; repeatable",
    )
    parser.add_argument(
        "--heads",
        metavar="REFERENCE",
        help="HACL heads for the hallucination view (default: those that the model was trained with, if known)",
    )
    parser.add_argument(
        "--thresholds", type=Path, metavar="FILE", help="what the view marks, made for this model by `shellv calibrate`"
    )
    parser.add_argument(
        "--device",
        default="cpu",
        help="where the model runs: cpu, cuda, mps, or auto for all GPUs together (default: %(default)s)",
    )
    parser.add_argument("--dtype", choices=DTYPES, default="float32", help="number format (default: %(default)s)")
    parser.add_argument(
        "--quantization",
        choices=QUANTIZATIONS,
        default="none",
        help="language model in 4 bits (nf4) or 8 (int8) (default: %(default)s)",
    )
    parser.add_argument(
        "--batching",
        choices=BATCHINGS,
        default="slots",
        help="requests side by side, or one after the other (default: %(default)s)",
    )
    parser.add_argument("--slots", type=int, default=16, help="requests that run at once (default: %(default)s)")
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
    from shellv_core.serving.transformers_engine import EngineConfig

    remote = build_config(RemoteImageConfig, {"hosts": args.image_host})
    config = ServeConfig(
        models_file=args.config,
        model=args.model or "",
        follow=not args.pin,
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
        quantization=None if args.quantization == "none" else args.quantization,
        adapters=named_references(args.adapter),
        heads=args.heads,
        thresholds=args.thresholds,
        engine=build_config(EngineConfig, {"batching": args.batching, "slots": args.slots}),
    )
    serve(config, until_stdin_closes=args.until_stdin_closes)
    return 0


def named_references(pairs: list[str]) -> dict[str, str]:
    """References by name from ``NAME=REFERENCE``."""
    from shellv_core.errors import ConfigError

    named: dict[str, str] = {}
    for pair in pairs:
        name, _, reference = pair.partition("=")
        if not name or not reference:
            raise ConfigError(
                f"--adapter {pair!r} is not of the form NAME=REFERENCE, for example --adapter hacl=adapter/."
            )
        if name in named:
            raise ConfigError(f"--adapter names {name!r} twice; every adapter needs a name of its own.")
        named[name] = reference
    return named
