"""The program of a decoder process: picture files come in on its standard input, RGB pixels go out.

A message is a line of JSON and the bytes that it counts. Pillow's readers are C code that sees a stranger's bytes:
here they have no secrets around them, bounded memory, no files to write, and a parent that kills what takes too long.
"""

from __future__ import annotations

import contextlib
import json
import sys
from typing import Any

from shellv_core.serving.engine import RequestError
from shellv_core.serving.images import ImageLimits, decode_image


def _confine(max_bytes: int) -> None:
    import resource  # not on Windows, where this program does not run either

    for kind, value in (
        (resource.RLIMIT_AS, max_bytes),
        (resource.RLIMIT_FSIZE, 0),
        (resource.RLIMIT_CORE, 0),
    ):
        # macOS refuses a bound on the address space.
        with contextlib.suppress(ValueError, OSError):
            resource.setrlimit(kind, (value, value))


def _answer(header: dict[str, Any], data: bytes, limits: ImageLimits) -> tuple[dict[str, Any], bytes]:
    try:
        image = decode_image(data, header["format"], limits, None)
        return {"size": image.size}, image.tobytes()
    except RequestError as error:
        return {"error": str(error), "code": error.code}, b""
    except MemoryError:
        return {"error": "the picture takes too much memory to decode.", "code": "image_too_large"}, b""


def main() -> None:
    """Decode until the input ends."""
    source, sink = sys.stdin.buffer, sys.stdout.buffer
    limits = ImageLimits.model_validate_json(sys.argv[1])
    from PIL import Image

    Image.init()  # every reader is loaded before the bound, and none after it
    _confine(limits.decode_bytes)
    while line := source.readline():
        header = json.loads(line)
        answer, pixels = _answer(header, source.read(header["num_bytes"]), limits)
        sink.write(json.dumps({**answer, "num_bytes": len(pixels)}).encode() + b"\n")
        sink.write(pixels)
        sink.flush()


if __name__ == "__main__":
    main()
