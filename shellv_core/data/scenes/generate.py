"""Scenes as records: picture, ground truth, captions and conversations, by index and reproducible."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from shellv_core.data.scenes.config import ScenesConfig
from shellv_core.data.scenes.language import describe, hallucinate, short_caption, speak
from shellv_core.data.scenes.questions import scene_conversations
from shellv_core.data.scenes.rendering import render_jpeg
from shellv_core.data.scenes.scene import Scene, Split, sample_scene, scene_rng
from shellv_core.data.scenes.statistics import training_company

SOURCE = "scenes"


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
