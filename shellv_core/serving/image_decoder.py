"""Decodes pictures in processes of their own, which are killed when one takes too long."""

from __future__ import annotations

import contextlib
import json
import queue
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import IO, TYPE_CHECKING, cast

import shellv_core
from shellv_core.serving.engine import QueueFullError, RequestError
from shellv_core.serving.images import ImageLimits

if TYPE_CHECKING:
    from PIL import Image

RETRY_AFTER_SECONDS = 2
START_SECONDS = 30.0


class PixelLease:
    """The pixels that one request holds, until it ends."""

    def __init__(self) -> None:
        self.pixels, self.open = 0, True


class ImageDecoder:
    """A pool of decoder processes; they start with the first picture.

    Args:
        limits: what a picture may cost.
    """

    def __init__(self, limits: ImageLimits) -> None:
        self.limits = limits
        self.threads = ThreadPoolExecutor(limits.decode_processes, "pictures")
        self._idle: queue.SimpleQueue[_Process] = queue.SimpleQueue()
        for _ in range(limits.decode_processes):
            self._idle.put(_Process(limits))
        self._lock = threading.Lock()
        self._pixels = 0

    @contextlib.contextmanager
    def lease(self) -> Iterator[PixelLease]:
        """Where a request's pixels are counted until it ends."""
        lease = PixelLease()
        try:
            yield lease
        finally:
            with self._lock:
                self._pixels -= lease.pixels
                lease.open = False

    def decode(self, data: bytes, image_format: str, param: str, lease: PixelLease) -> Image.Image:
        """The first frame of a picture file, upright and in RGB; blocks, so call it from `threads`.

        Raises:
            RequestError: if the file is broken, of another format or over a limit.
            QueueFullError: if all requests together hold too many pixels.
        """
        process = self._idle.get()
        try:
            return process.decode(data, image_format, param, lambda pixels: self._reserve(pixels, lease))
        finally:
            self._idle.put(process)

    def close(self) -> None:
        """End the processes; what they decode now is lost."""
        self.threads.shutdown(wait=False, cancel_futures=True)
        for _ in range(self.limits.decode_processes):
            with contextlib.suppress(queue.Empty):
                self._idle.get(timeout=self.limits.decode_seconds).stop()

    def _reserve(self, pixels: int, lease: PixelLease) -> None:
        with self._lock:
            if not lease.open:
                raise QueueFullError("the request has ended.", RETRY_AFTER_SECONDS)  # and nobody reads this
            if self._pixels + pixels > self.limits.max_pixels_in_flight:
                raise QueueFullError(
                    "the pictures of the requests that are being answered are too large together.", RETRY_AFTER_SECONDS
                )
            self._pixels += pixels
            lease.pixels += pixels


class _Process:
    """One decoder process, started when it is needed."""

    def __init__(self, limits: ImageLimits) -> None:
        self._limits = limits
        self._process: subprocess.Popen[bytes] | None = None

    def decode(self, data: bytes, image_format: str, param: str, reserve: Callable[[int], None]) -> Image.Image:
        from PIL import Image

        fresh = self._process is None
        process = self._process = self._process or self._start()
        sink, source = cast(IO[bytes], process.stdin), cast(IO[bytes], process.stdout)
        limit = self._limits.decode_seconds + (START_SECONDS if fresh else 0)
        timer = threading.Timer(limit, process.kill)
        timer.start()
        done = False
        try:
            header = {"format": image_format, "num_bytes": len(data)}
            sink.write(json.dumps(header).encode() + b"\n")
            sink.write(data)
            sink.flush()
            answer = json.loads(source.readline())
            if "error" in answer:
                done = True
                raise RequestError(answer["error"], param, answer["code"])
            width, height = answer["size"]
            reserve(width * height)
            pixels = source.read(answer["num_bytes"])
            image = Image.frombytes("RGB", (width, height), pixels)
            done = True
        except (OSError, ValueError):
            # It was killed, or it died: an empty line is no JSON, and too few pixels are no picture.
            raise RequestError(
                f"the picture's {len(data)} bytes could not be decoded within {self._limits.decode_seconds:g} s.",
                param,
                "invalid_image",
            ) from None
        finally:
            timer.cancel()
            if not done:
                self.stop()
        return image

    def stop(self) -> None:
        process, self._process = self._process, None
        if process is not None:
            process.kill()
            process.communicate()

    def _start(self) -> subprocess.Popen[bytes]:
        # Of the environment only where this package lies: the bytes are a stranger's.
        return subprocess.Popen(
            [sys.executable, "-P", "-m", "shellv_core.serving.image_worker", self._limits.model_dump_json()],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            env={"PYTHONPATH": str(Path(shellv_core.__file__).parents[1])},
            start_new_session=True,  # Ctrl-C is the server's to handle
        )
