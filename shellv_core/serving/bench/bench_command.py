"""``shellv bench serve``: how fast a server answers under load, alone or against another."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from shellv_core.serving.bench.client import Load, LoadClient
    from shellv_core.serving.bench.workload import Workload

DESCRIPTION = """\
Send seeded requests to an OpenAI-compatible server and time their tokens. In a closed loop so many clients each send
the next request when the last is answered; in an open loop requests come at random moments (Poisson), so that a slow
server makes them pile up. With --compare two servers get the same requests in turns, round by round.

  shellv bench serve http://127.0.0.1:8000 --clients 32 --lengths 8-200
  shellv bench serve http://127.0.0.1:8000 --rate 4 --image-share 0.5 --json figures.json
  shellv bench serve http://127.0.0.1:8000 --compare http://127.0.0.1:9000 --rounds 5
"""
EPILOG = """\
Durations count from when a request was due. first token: to the first text; between pieces: from one piece of text to
the next; per token: from first to last text, over the tokens but one; whole: to the stream's end. Of the client, loop
lag tells by how much a token may seem late; another machine than the server's is best.
"""
DEFAULT_CLIENTS = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the one verb and its load."""
    parser.description = "Measure how fast any OpenAI-compatible server answers under a load of seeded requests."
    verbs = parser.add_subparsers(dest="bench_verb", metavar="VERB", required=True)
    serve = verbs.add_parser(
        "serve",
        help="a server's latencies and tokens per second",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    serve.add_argument("url", metavar="URL", help="the server, for example http://127.0.0.1:8000")
    serve.add_argument("--compare", metavar="URL2", help="another server, asked the same in turns")
    loop = serve.add_mutually_exclusive_group()
    loop.add_argument("--clients", type=int, metavar="C", help=f"closed loop with so many (default: {DEFAULT_CLIENTS})")
    loop.add_argument("--rate", type=float, metavar="R", help="open loop with so many requests a second")
    serve.add_argument("--requests", type=int, default=64, metavar="N", help="in each round (default: %(default)s)")
    serve.add_argument("--rounds", type=int, default=3, metavar="N", help="(default: %(default)s)")
    serve.add_argument("--lengths", default="64", metavar="N|N-M", help="tokens of an answer (default: %(default)s)")
    serve.add_argument("--prompt-words", type=int, default=64, metavar="N", help="(default: %(default)s)")
    serve.add_argument(
        "--image-share", type=float, default=0.0, metavar="X", help="of requests with a picture (default: %(default)s)"
    )
    serve.add_argument("--image-size", type=int, default=224, metavar="PIXELS", help="(default: %(default)s)")
    serve.add_argument("--model", help="id to ask for (default: the first that the server lists)")
    serve.add_argument(
        "--key-variable", metavar="NAME", help="environment variable that holds the API key (default: no key)"
    )
    serve.add_argument(
        "--timeout", type=float, default=300.0, metavar="S", help="longest silence in an answer (default: %(default)s)"
    )
    serve.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    serve.add_argument("--json", type=Path, metavar="FILE", help="write all figures as well")


def main(args: argparse.Namespace) -> int:
    """Measure, print and write; returns the exit code, 1 if a server answered nothing.

    Raises:
        ConfigError: if a setting is out of range.
        ServingError: if a server does not answer, or the key is missing.
    """
    from shellv_core.config import build_config
    from shellv_core.serving.bench.figures import compare, figures_of, table
    from shellv_core.serving.bench.workload import Workload

    _check(args)
    workload = build_config(
        Workload,
        {
            name: getattr(args, name)
            for name in ("requests", "lengths", "prompt_words", "image_share", "image_size", "seed")
        },
    )
    urls = [args.url, *([args.compare] if args.compare else [])]
    loads = asyncio.run(measure(urls, workload, args))
    found = {url: figures_of(each) for url, each in zip(urls, loads, strict=True)}
    ratios = compare(loads[0], loads[1], args.seed) if args.compare else None
    if args.json:
        loop = {"rate": args.rate} if args.rate else {"clients": args.clients or DEFAULT_CLIENTS}
        record = {"workload": workload.model_dump(), "rounds": args.rounds, **loop, "servers": found, "ratios": ratios}
        args.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write("\n".join(table(found, ratios)) + "\n")
    return 0 if all(each["tokens"] for each in found.values()) else 1


async def measure(urls: list[str], workload: Workload, args: argparse.Namespace) -> list[list[Load]]:
    """The loads of each server, round by round in turns; a request before the first round warms each up.

    Raises:
        ServingError: if a server does not answer.
    """
    import contextlib

    from shellv_core.endpoint.client import EndpointClient
    from shellv_core.progress import Progress
    from shellv_core.serving.bench.client import LoadClient
    from shellv_core.serving.bench.workload import make_requests

    key = _key(args.key_variable)
    names = [args.model or str((await EndpointClient(url, key).model())["id"]) for url in urls]
    loads: list[list[Load]] = [[] for _ in urls]
    async with contextlib.AsyncExitStack() as stack:
        clients = [await stack.enter_async_context(LoadClient(url, key, args.timeout)) for url in urls]
        for client, name in zip(clients, names, strict=True):
            await client.ask(make_requests(workload, -1, name)[0])
        with Progress(args.rounds * len(urls) * workload.requests, "requests", "requests") as progress:
            for number in range(args.rounds):
                # The first of a round changes, so that what grows over time falls on both.
                for index in range(len(urls)) if number % 2 == 0 else reversed(range(len(urls))):
                    requests = make_requests(workload, number, names[index])
                    loads[index].append(await _round(clients[index], requests, args, number, progress.update))
    return loads


async def _round(client: LoadClient, requests: Any, args: argparse.Namespace, number: int, done: Any) -> Load:
    from shellv_core.serving.bench.client import closed_loop, open_loop

    if args.rate:
        return await open_loop(client, requests, args.rate, args.seed + number, done)
    return await closed_loop(client, requests, args.clients or DEFAULT_CLIENTS, done)


def _key(variable: str | None) -> str:
    from shellv_core.errors import ServingError

    if not variable:
        return ""
    key = os.environ.get(variable, "")
    if not key:
        raise ServingError(f"the environment variable {variable} is not set; it must hold the API key.")
    return key


def _check(args: argparse.Namespace) -> None:
    from shellv_core.errors import ConfigError

    for name in ("clients", "rate", "rounds", "timeout"):
        value = getattr(args, name)
        if value is not None and value <= 0:
            raise ConfigError(f"--{name} {value:g} is not above 0.")
