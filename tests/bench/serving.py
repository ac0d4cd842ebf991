"""Slots against one request at a time, run-to-completion batches and LLaVA's five threads, over HTTP.

    python -m tests.bench.serving            # about 10 minutes on two cores that have nothing else to do

Each variant is a server of its own (`tests.bench.serving_variants`) with the same random model of 30 million
parameters; all are up from the start, and are asked in turns, round by round, by `shellv bench serve`'s client in a
closed loop. Writes OUTPUT.md and OUTPUT.json; all figures of one file come from one run.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from shellv_core.endpoint.client import EndpointClient, EndpointError
from shellv_core.logs import setup_logging
from shellv_core.progress import Progress
from shellv_core.serving.bench.client import OK, Load, LoadClient, closed_loop
from shellv_core.serving.bench.figures import compare, figures_of
from shellv_core.serving.bench.workload import Workload, make_requests
from tests.bench.serving_variants import VARIANTS, build_bench_model

#: Short enough for two rounds within the time; twice as many requests as clients, so that places are filled again.
WORKLOADS = {"fixed": "64", "mixed": "8-100"}
NAMES = {
    "slots": "slots (ours)",
    "serial": "one at a time",
    "batches": "run-to-completion batches",
    "threads": "LLaVA's way, 5 threads",
}
START_SECONDS = 300.0
Loads = dict[str, dict[str, list[Load]]]
"""Workload -> variant -> rounds."""


@contextlib.contextmanager
def running(variant: str, model: Path, args: argparse.Namespace, log: Path) -> Iterator[str]:
    """A server of one variant; yields its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "tests.bench.serving_variants", variant, str(model), "--port", str(port)]
    command += ["--slots", str(args.clients), "--threads", str(args.threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(args.threads)}
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
    try:
        yield _ready(process, f"http://127.0.0.1:{port}", log)
    finally:
        process.terminate()
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _ready(process: subprocess.Popen[bytes], url: str, log: Path) -> str:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(EndpointError):
            asyncio.run(EndpointClient(url).check_readiness())
            return url
        time.sleep(0.2)
    raise SystemExit(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")


async def measure(urls: Mapping[str, str], args: argparse.Namespace) -> tuple[Loads, int]:
    """All loads, and how many rounds there was time for."""
    loads: Loads = {name: {variant: [] for variant in urls} for name in WORKLOADS}
    begun = time.monotonic()
    rounds, longest = 0, 0.0
    async with contextlib.AsyncExitStack() as stack:
        clients = {variant: await stack.enter_async_context(LoadClient(url, "", 3600)) for variant, url in urls.items()}
        warm = Workload(requests=2, lengths="4", prompt_words=args.prompt_words)
        for variant, client in clients.items():
            await closed_loop(client, make_requests(warm, -1, variant), 2, lambda: None)
        total = args.rounds * len(WORKLOADS) * len(urls) * args.requests
        with Progress(total, "requests", "requests") as progress:
            for number in range(args.rounds):
                if rounds and time.monotonic() - begun + longest > args.limit:
                    print(f"no time for round {number + 1} within {args.limit:g} s", flush=True)
                    break
                started = time.monotonic()
                for (name, lengths), variant in _turns(list(urls), number):
                    workload = Workload(requests=args.requests, lengths=lengths, prompt_words=args.prompt_words)
                    requests = make_requests(workload, number, variant)
                    load = await closed_loop(clients[variant], requests, args.clients, progress.update)
                    loads[name][variant].append(load)
                    tokens = sum(each.tokens for each in load.answers)
                    print(f"round {number} {name:5} {variant:8} {tokens / load.seconds:7.1f} tokens/s", flush=True)
                rounds, longest = rounds + 1, max(longest, time.monotonic() - started)
    return loads, rounds


def _turns(variants: list[str], number: int) -> Iterator[tuple[tuple[str, str], str]]:
    """Workloads and variants of a round; every other round the variants go backwards."""
    for workload in WORKLOADS.items():
        for variant in variants if number % 2 == 0 else variants[::-1]:
            yield workload, variant


def summarize(loads: Loads) -> dict[str, Any]:
    """Figures of each variant, and the ratios of slots to the others."""
    result: dict[str, Any] = {}
    for name, by_variant in loads.items():
        result[name] = {
            "figures": {variant: figures_of(rounds) for variant, rounds in by_variant.items()},
            "ratios": {
                variant: compare(by_variant["slots"], rounds)
                for variant, rounds in by_variant.items()
                if variant != "slots"
            },
        }
    return result


def document(record: dict[str, Any]) -> str:
    """The page."""
    lines = [
        "# Serving speed",
        "",
        "Written by `python -m tests.bench.serving`. Four servers with one random language model of"
        f" {record['parameters'] / 1e6:.1f} million parameters (float32), asked in turns by {record['clients']} clients"
        f" in a closed loop: {record['requests']} requests of {record['prompt_words']} words in each of"
        f" {record['rounds']} rounds, answers of {WORKLOADS['fixed']} tokens (fixed) or {WORKLOADS['mixed']} (mixed)."
        f" {record['machine']}, load {record['load_before']:.1f} before, {record['threads']} threads a server.",
        "",
    ]
    if record["load_before"] > 0.5 * record["cores"]:
        lines += ["**The machine was busy with other work: read ratios only, and those with care.**", ""]
    for name in WORKLOADS:
        lines += _section(name, record["results"][name])
    return "\n".join(lines)


def _section(name: str, result: dict[str, Any]) -> list[str]:
    figures, ratios = result["figures"], result["ratios"]
    lines = [
        f"## {name.capitalize()} lengths",
        "",
        "| | tokens/s | first token p50 | p95 | p99 | per token p50 | p95 | whole p50 | p95 | p99 | failed |",
        "|---|---:|---:|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for variant, each in figures.items():
        cells = [f"{each['tokens_per_second']:.1f}"]
        cells += [f"{each['first_token'].get(key, float('nan')):.2f} s" for key in ("p50", "p95", "p99")]
        cells += [f"{1e3 * each['per_token'].get(key, float('nan')):.0f} ms" for key in ("p50", "p95")]
        cells += [f"{each['whole'].get(key, float('nan')):.1f} s" for key in ("p50", "p95", "p99")]
        cells.append(str(each["requests"] - each["by_status"].get(OK, 0)))
        lines.append(f"| {NAMES[variant]} | " + " | ".join(cells) + " |")
    lines += ["", "Slots to the others, 95 % intervals in brackets:", ""]
    lines += ["| to | tokens/s | first token p50 | whole p50 |", "|---|---:|---:|---:|"]
    for variant, each in ratios.items():
        keys = ("tokens_per_second", "first_token_p50", "whole_p50")
        lines.append(f"| {NAMES[variant]} | " + " | ".join(_ratio(each.get(key)) for key in keys) + " |")
    client = figures["slots"]["client"]
    return [
        *lines,
        "",
        *(f"- {text}: {'met' if met else '**not met**'} ({value})." for text, met, value in verdicts(ratios)),
        f"- The client took {100 * client['cpu_share']:.0f} % of a core while it measured slots; its event loop was"
        f" late by {1e3 * client['loop_lag_p99']:.0f} ms at p99.",
        "",
    ]


def verdicts(ratios: Mapping[str, Mapping[str, Mapping[str, float]]]) -> list[tuple[str, bool, str]]:
    """What was aimed at, whether it is so, and the figure."""
    rate = ratios["serial"]["tokens_per_second"]["ratio"]
    first = ratios["batches"]["first_token_p50"]["ratio"]
    threads = ratios["threads"]["tokens_per_second"]["ratio"]
    return [
        ("At least 4 times the tokens/s of one at a time", rate >= 4, f"{rate:.2f}"),
        ("First token p50 at most a quarter of run-to-completion batches'", first <= 0.25, f"{first:.3f}"),
        ("More tokens/s than LLaVA's way", threads > 1, f"{threads:.2f}"),
    ]


def _ratio(found: Mapping[str, float] | None) -> str:
    if found is None:
        return "-"
    if found["low"] == found["high"]:  # of a single round
        return f"{found['ratio']:.2f}"
    return f"{found['ratio']:.2f} [{found['low']:.2f}, {found['high']:.2f}]"


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--requests", type=int, default=64, help="of each round and kind of lengths")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--prompt-words", type=int, default=16, help="of about four tokens each")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--limit", type=float, default=660.0, help="seconds; a round that would go beyond is left out")
    parser.add_argument("--output", type=Path, default=Path("docs/serving-figures"))
    args = parser.parse_args(arguments)
    setup_logging()
    load_before = os.getloadavg()[0]
    with tempfile.TemporaryDirectory() as folder, contextlib.ExitStack() as stack:
        model = Path(folder) / "model"
        parameters = build_bench_model(model)
        urls = {
            variant: stack.enter_context(running(variant, model, args, Path(folder) / f"{variant}.log"))
            for variant in VARIANTS
        }
        loads, rounds = asyncio.run(measure(urls, args))
    record = {
        "parameters": parameters,
        "clients": args.clients,
        "requests": args.requests,
        "rounds": rounds,
        "prompt_words": args.prompt_words,
        "threads": args.threads,
        "cores": os.cpu_count() or 1,
        "machine": f"{os.cpu_count()} cores ({platform.machine()})",
        "load_before": load_before,
        "results": summarize(loads),
    }
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.with_suffix(".md").write_text(document(record), encoding="utf-8")
    args.output.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    print(document(record))


if __name__ == "__main__":
    main()
