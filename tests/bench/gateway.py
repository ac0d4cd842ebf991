"""What a gateway before a server costs: ``python -m tests.bench.gateway``.

Both are processes of their own, and a tiny model answers, so that what the gateway adds shows. Requests to the server
and through the gateway alternate. The gateway's processor time is free of what else the machine does; times on the
clock are not.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import httpx
import yaml

from shellv_core.serving.local_server import free_port, local_server
from tests.serving.tiny_model import build_model, build_processor, data_url, picture

ROUNDS, TOKENS = 20, 200
HOST = "127.0.0.1"
START_SECONDS = 300.0


def main() -> None:
    """Print the overhead for a request and for a token."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor = build_processor()
        build_model(processor, context_length=4096).save_pretrained(folder / "model")
        processor.save_pretrained(folder / "model")
        with local_server(str(folder / "model"), HOST, 0, folder / "server.log", START_SECONDS) as server:
            measure(server.url, folder)


def measure(server: str, folder: Path) -> None:
    """Compare `server` with a gateway before it."""
    path = folder / "models.yaml"
    path.write_text(yaml.safe_dump({"models": [{"id": "model", "engine": "http", "urls": [server]}]}))
    port, operations = free_port(HOST), free_port(HOST)
    command = [sys.executable, "-m", "shellv_core.cli", "serve", "--config", str(path), "--port", str(port)]
    command += ["--operations-port", str(operations), "--no-ui", "--until-stdin-closes"]
    gateway = f"http://{HOST}:{port}"
    with (
        (folder / "gateway.log").open("wb") as log,
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=log, stderr=log) as process,
        httpx.Client(timeout=120) as client,
    ):
        await_ready(client, gateway, process)
        ask(client, server, 2), ask(client, gateway, 2)
        pairs = [(ask(client, server, TOKENS), ask(client, gateway, TOKENS)) for _ in range(ROUNDS)]
        first = statistics.median(through[0] - direct[0] for direct, through in pairs)
        whole = statistics.median((through[1] - through[0]) - (direct[1] - direct[0]) for direct, through in pairs)
        print(f"until the first token: {1000 * statistics.median(each[0][0] for each in pairs):.1f} ms at the server")
        print(f"  + {1000 * first:.1f} ms a request through the gateway")
        print(f"+ {1000 * whole / (TOKENS - 1):.3f} ms a token through the gateway")
        base = cpu_seconds(client, operations)
        for _ in range(ROUNDS):
            ask(client, gateway, 1)
        short = (cpu_seconds(client, operations) - base) / ROUNDS
        base = cpu_seconds(client, operations)
        for _ in range(ROUNDS):
            ask(client, gateway, TOKENS)
        long = (cpu_seconds(client, operations) - base) / ROUNDS
        print(f"processor time of the gateway: {1000 * short:.1f} ms a request with a picture of 48 x 40 pixels,")
        print(f"  {1000 * (long - short) / (TOKENS - 1):.3f} ms a token ({ROUNDS} rounds of {TOKENS} tokens)")
        assert process.stdin is not None
        process.stdin.close()


def ask(client: httpx.Client, url: str, tokens: int) -> tuple[float, float]:
    """Seconds until the first token and until the end of one streamed answer."""
    content = [
        {"type": "image_url", "image_url": {"url": data_url(picture("red"))}},
        {"type": "text", "text": "hello"},
    ]
    body = {"messages": [{"role": "user", "content": content}], "max_tokens": tokens, "stream": True}
    started, first = time.perf_counter(), 0.0
    with client.stream("POST", f"{url}/v1/chat/completions", json=body) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if not first and '"content":"' in line.replace(" ", "") and '"role"' not in line:
                first = time.perf_counter() - started
    return first, time.perf_counter() - started


def cpu_seconds(client: httpx.Client, port: int) -> float:
    """Processor time that the gateway has used."""
    text = client.get(f"http://{HOST}:{port}/metrics").text
    line = next(line for line in text.splitlines() if line.startswith("process_cpu_seconds_total"))
    return float(line.split()[1])


def await_ready(client: httpx.Client, url: str, process: subprocess.Popen[bytes]) -> None:
    """Return when the gateway takes requests."""
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline and process.poll() is None:
        try:
            if client.get(f"{url}/readyz").status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.2)
    raise SystemExit("the gateway did not start")


if __name__ == "__main__":
    main()
