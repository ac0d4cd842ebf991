"""``shellv chat``: talk with a model about a picture in the terminal."""

from __future__ import annotations

import argparse
import contextlib
import logging
import os

KEY_VARIABLE = "SHELLV_API_KEY"
LOCAL = {"adapter": [], "device": "cpu", "dtype": "float32", "quantization": "none"}
"""What says how a model is loaded here, and its default."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare whom to talk with and how."""
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--model",
        metavar="REFERENCE",
        help="a model directory, the s3:// or file:// address of a merge_lora output, or models:/NAME@ALIAS",
    )
    source.add_argument(
        "--url",
        help=f"an endpoint that runs already, for example http://127.0.0.1:8000; its key, if it asks for one, in"
        f" {KEY_VARIABLE}",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        metavar="NAME=REFERENCE",
        help="a LoRA adapter beside the model, for /adapter NAME: its folder, or a finetune output; repeatable",
    )
    parser.add_argument(
        "--device",
        default=LOCAL["device"],
        help="where the model runs: cpu, cuda, mps, or auto for all GPUs together (default: %(default)s)",
    )
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16", "float16"),
        default=LOCAL["dtype"],
        help="number format (default: %(default)s)",
    )
    parser.add_argument(
        "--quantization",
        choices=("none", "nf4", "int8"),
        default=LOCAL["quantization"],
        help="language model in 4 bits (nf4) or 8 (int8) (default: %(default)s)",
    )
    parser.add_argument("--image", metavar="FILE|URL", help="a picture (png, jpeg, webp or gif) for the first question")
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
    from shellv_core.errors import ConfigError
    from shellv_core.serving.chat import Chat

    options = {"temperature": args.temperature, "top_p": args.top_p}
    options |= {key: value for key in ("max_tokens", "seed") if (value := getattr(args, key)) is not None}
    if args.url is not None:
        for name, default in LOCAL.items():
            if getattr(args, name) != default:
                raise ConfigError(f"--{name} says how --model is loaded; at --url it is the server's matter.")
        return Chat(EndpointClient(args.url, os.environ.get(KEY_VARIABLE, "")), args.image, options).run()
    with contextlib.ExitStack() as stack:
        # The server's own lines would stand between the answers.
        logging.getLogger("shellv_core.serving").setLevel(logging.WARNING)
        from shellv_core.serving.serve_command import named_references
        from shellv_core.serving.server import ServeConfig, background_server

        config = ServeConfig(
            model=args.model,
            follow=False,
            port=0,
            operations_port=None,
            ui=False,
            device=args.device,
            dtype=args.dtype,
            quantization=None if args.quantization == "none" else args.quantization,
            adapters=named_references(args.adapter),
        )
        return Chat(EndpointClient(stack.enter_context(background_server(config))), args.image, options).run()
