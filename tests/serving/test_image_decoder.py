"""Decoder processes: what they return, what kills them, and how much they may hold."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from shellv_core.serving.engine import QueueFullError, RequestError
from shellv_core.serving.image_decoder import ImageDecoder
from shellv_core.serving.images import ImageLimits
from tests.serving.tiny_model import picture


@pytest.fixture(scope="module")
def decoder():
    decoder = ImageDecoder(ImageLimits(decode_processes=1, max_pixels_in_flight=10_000))
    yield decoder
    decoder.close()


def process_of(decoder):
    process = decoder._idle.get()
    decoder._idle.put(process)
    return process._process


def test_pictures_come_back_whole(decoder):
    from shellv_core.serving.images import decode_image

    for kind in ("PNG", "JPEG", "WEBP", "GIF"):
        data = picture("green", format=kind)
        with decoder.lease() as lease:
            image = decoder.decode(data, kind, "here", lease)
            assert lease.pixels == 48 * 40
        assert image.tobytes() == decode_image(data, kind, decoder.limits, None).tobytes()
        assert isinstance(image, Image.Image)


def test_a_fault_leaves_the_process_alive(decoder):
    with decoder.lease() as lease:
        decoder.decode(picture(), "PNG", "here", lease)
        pid = process_of(decoder).pid
        with pytest.raises(RequestError, match="not a complete image/png file") as caught:
            decoder.decode(picture()[:50], "PNG", "there", lease)
        assert (caught.value.param, caught.value.code) == ("there", "invalid_image")
        decoder.decode(picture(), "PNG", "here", lease)
    assert process_of(decoder).pid == pid


def test_pixels_are_counted_until_the_request_ends(decoder):
    large = picture(size=(90, 90))
    with decoder.lease() as lease:
        decoder.decode(large, "PNG", "here", lease)
        with pytest.raises(QueueFullError), decoder.lease() as other:
            decoder.decode(large, "PNG", "here", other)
    with decoder.lease() as lease:
        decoder.decode(large, "PNG", "here", lease)
    with pytest.raises(QueueFullError):
        decoder.decode(large, "PNG", "here", lease)  # the request has ended: nothing would free it
    assert decoder._pixels == 0


def test_a_killed_process_is_replaced(decoder):
    with decoder.lease() as lease:
        decoder.decode(picture(), "PNG", "here", lease)
        os.kill(process_of(decoder).pid, signal.SIGKILL)
        with pytest.raises(RequestError, match="could not be decoded"):
            decoder.decode(picture(), "PNG", "here", lease)
        assert decoder.decode(picture(), "PNG", "here", lease).size == (48, 40)


def test_a_process_that_hangs_is_killed():
    decoder = ImageDecoder(ImageLimits(decode_processes=1, decode_seconds=0.3))
    try:
        with decoder.lease() as lease:
            decoder.decode(picture(), "PNG", "here", lease)
            first = process_of(decoder)
            os.kill(first.pid, signal.SIGSTOP)
            with pytest.raises(RequestError, match=r"within 0\.3 s"):
                decoder.decode(picture(), "PNG", "here", lease)
        assert first.returncode == -signal.SIGKILL
    finally:
        decoder.close()


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_process_has_bounds_and_no_secrets(decoder):
    with decoder.lease() as lease:
        decoder.decode(picture(), "PNG", "here", lease)
    pid = process_of(decoder).pid
    lines = Path(f"/proc/{pid}/limits").read_text().splitlines()
    bounds = {line[:26].strip(): line[26:].split()[0] for line in lines}
    assert bounds["Max address space"] == str(decoder.limits.decode_bytes)
    assert bounds["Max file size"] == bounds["Max core file size"] == "0"
    environ = Path(f"/proc/{pid}/environ").read_text().split("\0")
    assert {line.partition("=")[0] for line in environ if line} == {"PYTHONPATH"}


def test_memory_is_bounded():
    """A process with too little of it says so, and lives on."""
    decoder = ImageDecoder(ImageLimits(decode_processes=1, decode_bytes=300 << 20))
    try:
        with decoder.lease() as lease:
            with pytest.raises(RequestError) as caught:
                decoder.decode(picture("black", size=(5000, 5000), optimize=True), "PNG", "here", lease)
            assert caught.value.code in ("image_too_large", "invalid_image")
            assert decoder.decode(picture(), "PNG", "here", lease).size == (48, 40)
    finally:
        decoder.close()


def test_closing_ends_the_processes():
    decoder = ImageDecoder(ImageLimits(decode_processes=2))
    with decoder.lease() as lease:
        decoder.decode(picture(), "PNG", "here", lease)
        process = decoder._idle.get(), decoder._idle.get()
        for each in process:
            decoder._idle.put(each)
    running = [each._process for each in process if each._process is not None]
    decoder.close()
    deadline = time.monotonic() + 10
    while any(each.poll() is None for each in running) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert running
    assert all(each.returncode is not None for each in running)
