"""Worker processes: servers of one model on this machine that are started, watched, restarted and ended with us."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
from collections.abc import Sequence

import yaml

from shellv_core.endpoint.client import endpoint_url
from shellv_core.errors import ServingError
from shellv_core.logs import get_logger
from shellv_core.serving.gateway.config import ModelEntry, ModelsFile
from shellv_core.serving.gateway.replica import Replica
from shellv_core.serving.http.config import ApiConfig, BodyLimits, KeyLimits, RequestLimits
from shellv_core.serving.http.keys import new_key
from shellv_core.serving.images import ImageLimits
from shellv_core.serving.local_server import STOP_SECONDS, free_port, log_tail
from shellv_core.storage import home

logger = get_logger(__name__)

HOST = "127.0.0.1"
FIRST_BACKOFF_SECONDS, MAX_BACKOFF_SECONDS = 0.5, 30.0
STEADY_SECONDS = 60.0
"""A worker that ran for so long is restarted at once."""
#: Pictures come as PNG, which is larger than the file that passed the gateway's own limits.
LIMITS = ApiConfig(
    request=RequestLimits(images=ImageLimits(max_bytes=96 << 20)),
    body=BodyLimits(max_bytes=512 << 20, max_bytes_in_flight=2 << 30),
    keys=KeyLimits(requests_per_minute=1e9, burst=10**9, max_running=10**6),
)


class Worker:
    """One process of ``shellv serve`` on loopback, restarted whenever it ends, each time with a pause twice as long.

    It asks for a key that nobody else has: who reaches loopback does not get past the gateway's own keys.

    Args:
        entry: what it serves, embedded there.
        label: names its log and its configuration below the project folder.
    """

    def __init__(self, entry: ModelEntry, label: str) -> None:
        self.label = label
        self.log_path = home() / "logs" / "workers" / f"{label}.log"
        self.replica: Replica | None = None
        self.failed_starts = 0
        self._entry, self._name = entry, entry.id
        self._secret, self._key = new_key("gateway", frozenset({"chat"}))
        self._process: subprocess.Popen[bytes] | None = None
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._live, name=f"worker {label}", daemon=True)
        self._thread.start()

    @property
    def pid(self) -> int | None:
        """The process's id, if there is one now."""
        return self._process.pid if self._process is not None and self._process.poll() is None else None

    def stop(self) -> None:
        """Let the process finish what it answers, and do not start it again; does not wait."""
        self._ended.set()
        process = self._process
        if process is not None and process.poll() is None:
            process.terminate()

    def join(self) -> None:
        """Return when a stopped process is gone."""
        self._thread.join()

    def _live(self) -> None:
        pause = FIRST_BACKOFF_SECONDS
        while not self._ended.is_set():
            started = time.monotonic()
            try:
                code = self._run()
            except OSError as error:
                logger.error("worker %s cannot be started: %s", self.label, error)
                code = -1
            was_ready, self.replica = self.replica is not None and self.replica.ready, None
            if self._ended.is_set():
                return
            self.failed_starts += not was_ready
            pause = FIRST_BACKOFF_SECONDS if time.monotonic() - started > STEADY_SECONDS else pause
            logger.warning(
                "worker %s ended with code %d and starts again in %.1f s; its log: %s",
                self.label, code, pause, self.log_path,
            )  # fmt: skip
            self._ended.wait(pause)
            pause = min(2 * pause, MAX_BACKOFF_SECONDS)

    def _run(self) -> int:
        """One life of the process; returns its exit code."""
        port, operations_port = free_port(HOST), free_port(HOST)
        path = home() / "workers" / f"{self.label}.yaml"
        path.parent.mkdir(parents=True, exist_ok=True)
        content = ModelsFile(models=(self._entry,), api=LIMITS).model_dump(mode="json", exclude_defaults=True)
        path.write_text(yaml.safe_dump(content), encoding="utf-8")
        keys = path.with_suffix(".keys")
        keys.write_text(self._key.line() + "\n", encoding="utf-8")
        command = [sys.executable, "-m", "shellv_core.cli", "serve", "--config", str(path), "--host", HOST]
        command += ["--port", str(port), "--operations-port", str(operations_port), "--no-ui", "--until-stdin-closes"]
        command += ["--keys", str(keys)]
        self.log_path.parent.mkdir(parents=True, exist_ok=True)
        if self.log_path.exists():
            self.log_path.replace(self.log_path.with_suffix(".log.1"))
        with self.log_path.open("wb") as log:
            # In a group of its own, so that a terminal's Ctrl-C reaches us alone.
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=log, stderr=subprocess.STDOUT, process_group=0
            )
        self._process = process
        self.replica = Replica(endpoint_url(HOST, port), self._name, endpoint_url(HOST, operations_port), self._secret)
        try:
            while process.poll() is None and not self._ended.wait(0.1):
                pass
            if process.poll() is None:
                process.terminate()
                _await_end(process, self.label)
            return process.returncode
        finally:
            if process.stdin is not None:
                process.stdin.close()


class WorkerPool:
    """The replicas of one model, each a `Worker`.

    Args:
        entry: as configured, with engine ``worker``.
        reference: what to serve, which always names the same model.
        generation: tells the files of two revisions apart.
    """

    def __init__(self, entry: ModelEntry, reference: str, generation: int) -> None:
        places = entry.devices or (entry.device,)
        safe = entry.id.replace("/", "_").replace(":", "_")
        self.workers = [
            Worker(
                entry.model_copy(
                    update={
                        "engine": "embedded",
                        "model": reference,
                        "follow": False,
                        "replicas": 1,
                        "devices": (),
                        "device": places[index % len(places)],
                    }
                ),
                f"{safe}-{generation}-{index}",
            )
            for index in range(entry.replicas)
        ]

    def replicas(self) -> Sequence[Replica]:
        """Those that run now."""
        return [worker.replica for worker in self.workers if worker.replica is not None]

    def check(self) -> None:
        """Raise if a worker ended before it was ready.

        Raises:
            ServingError: with the last lines of its log.
        """
        for worker in self.workers:
            if worker.failed_starts:
                raise ServingError(f"worker {worker.label} ended before it was ready:\n{log_tail(worker.log_path)}")

    def stop(self) -> None:
        """End all processes, which finish what they answer."""
        for worker in self.workers:
            worker.stop()
        for worker in self.workers:
            worker.join()


def _await_end(process: subprocess.Popen[bytes], label: str) -> None:
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        logger.warning("worker %s has not stopped for %g seconds: killed", label, STOP_SECONDS)
        process.kill()
        process.wait()
