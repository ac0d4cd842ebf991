"""Samples as one HTML page with their images inside."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence

from shellv_core.data.samples import HallucinatedCaption, Sample
from shellv_core.storage import InputDirectory

_THUMBNAIL = 256


def render_gallery(source: InputDirectory, split: str, samples: Sequence[Sample]) -> str:
    """A page that opens offline: thumbnails, captions, lies with their changed words marked, conversations."""
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("shellv_core.data", "pages"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("gallery.html.jinja").render(
        uri=source.uri,
        content=source.content_sha256[:16],
        split=split,
        cards=[
            {
                "sample": sample,
                "thumbnail": None if sample.image is None else thumbnail(sample.image),
                "lies": [(item.type, *_marked(item)) for item in sample.hallucinated_captions],
                "conversations": [sample.conversations, *sample.more_conversations],
            }
            for sample in samples
        ],
    )


def thumbnail(image: bytes) -> str:
    """A small JPEG of an encoded image, as a data URL."""
    from PIL import Image

    with Image.open(io.BytesIO(image)) as opened:
        small = opened.convert("RGB")
    small.thumbnail((_THUMBNAIL, _THUMBNAIL))
    buffer = io.BytesIO()
    small.save(buffer, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(buffer.getvalue()).decode()}"


def _marked(item: HallucinatedCaption) -> tuple[str, str, str]:
    """The text before, of and after the changed words; the middle is empty where they are not known."""
    before, found, after = item.text.partition(item.replacement) if item.replacement else (item.text, "", "")
    return before, found, after
