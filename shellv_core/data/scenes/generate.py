"""Scenes as records: picture, ground truth, captions and conversations, by index and reproducible."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import threading
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

from shellv_core.data.scenes.config import ScenesConfig
from shellv_core.data.scenes.language import describe, hallucinate, short_caption, speak
from shellv_core.data.scenes.questions import scene_conversations
from shellv_core.data.scenes.rendering import render_jpeg
from shellv_core.data.scenes.scene import Scene, Split, sample_scene, scene_rng
from shellv_core.data.scenes.statistics import training_company

SOURCE = "scenes"
_CHUNK = 64  # scenes per task of a worker process


@dataclass(frozen=True)
class SceneRequest:
    """Which scenes to make: those of one split of one data set."""

    config: ScenesConfig
    seed: int
    split: Split
    num_train: int  # size of the training split, whose statistics give hard negatives


def scene_record(request: SceneRequest, index: int) -> tuple[Scene, dict[str, Any]]:
    """Return scene `index` and the JSON record of its sample, without rendering."""
    scene = sample_scene(request.config, request.seed, request.split, index)
    company = training_company(request.config, request.seed, request.num_train)
    rng = scene_rng(request.seed, request.split, index, "language")
    description = describe(scene, rng)
    caption = speak(description)
    hallucinated = hallucinate(scene, description, company.together, rng)
    talks = scene_conversations(
        request.config,
        scene,
        caption,
        short_caption(scene, rng),
        hallucinated,
        company.frequency,
        company.together,
        rng,
    )
    record = {
        "id": scene.key,
        "image": f"{scene.key}.jpg",
        "conversations": talks[0][1],
        "more_conversations": [talk for _, talk in talks[1:]],
        "tasks": [task for task, _ in talks],
        "caption": caption,
        "hallucinated_captions": [asdict(item) for item in hallucinated],
        "objects": [asdict(item) for item in scene.objects],
        "source": SOURCE,
    }
    return scene, record


def scene_sample(request: SceneRequest, index: int) -> tuple[bytes, dict[str, Any]]:
    """Return the JPEG and the record of scene `index`."""
    scene, record = scene_record(request, index)
    return render_jpeg(scene, request.config.image_size, request.config.jpeg_quality), record


def _chunk(request: SceneRequest, indices: Iterable[int]) -> list[tuple[bytes, dict[str, Any]]]:
    return [scene_sample(request, index) for index in indices]


def scene_samples(
    request: SceneRequest, start: int, stop: int, num_workers: int = 1
) -> Iterator[tuple[bytes, dict[str, Any]]]:
    """Yield (JPEG, record) of scenes `start` to `stop` in order; the result does not depend on `num_workers`.

    Args:
        request: Which scenes.
        start: First index.
        stop: One past the last index.
        num_workers: Processes to use.
    """
    if num_workers == 1 or stop - start <= _CHUNK:
        for index in range(start, stop):
            yield scene_sample(request, index)
        return
    chunks = [range(first, min(first + _CHUNK, stop)) for first in range(start, stop, _CHUNK)]
    with ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), _end_with_parent) as pool:
        # Submitted in rounds, so that a slow consumer does not fill the memory.
        for first in range(0, len(chunks), num_workers * 4):
            current = chunks[first : first + num_workers * 4]
            yield from itertools.chain.from_iterable(pool.map(_chunk, itertools.repeat(request), current))


def _end_with_parent() -> None:
    """Let a worker end when its parent was killed, which the pool itself does not do."""
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
