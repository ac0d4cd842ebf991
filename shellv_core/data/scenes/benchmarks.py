"""POPE, Hal-Eval and CHAIR over validation scenes, in the files' upstream formats."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from random import Random
from typing import Any, Literal

from shellv_core.data.scenes.questions import existence_question
from shellv_core.data.scenes.statistics import Company
from shellv_core.data.scenes.vocabulary import CATEGORIES
from shellv_core.errors import DataError

PopeSplit = Literal["random", "popular", "adversarial"]
POPE_SPLITS: tuple[PopeSplit, ...] = ("random", "popular", "adversarial")

# Hal-Eval's names, in the order of its files.
HAL_EVAL_TYPES = {
    "relation": "Spatial Relationship Hallucination",
    "object": "Objective Hallucination",
    "attribute": "Attributive Hallucination",
    "event": "Event Hallucination",
}


def pope_name(split: PopeSplit) -> str:
    """Return the file's name in the data set's folder."""
    return f"benchmarks/pope/{split}.jsonl"


HAL_EVAL_NAME = "benchmarks/hal_eval/scenes.json"
CHAIR_NAME = "benchmarks/chair/scenes.jsonl"


def benchmark_files(
    records: Sequence[Mapping[str, Any]], company: Company, num_images: int, questions_per_image: int, seed: int
) -> dict[str, bytes]:
    """Return name -> content of all benchmark files.

    Args:
        records: Records of the validation scenes.
        company: Statistics of the training scenes.
        num_images: Images per benchmark. POPE takes the first ones with enough objects, the others simply the first.
        questions_per_image: POPE questions about an image, half of them to be answered yes.
        seed: Seed of POPE's choices.

    Raises:
        DataError: if there are not enough scenes.
    """
    rich = [record for record in records if len(record["objects"]) >= questions_per_image // 2][:num_images]
    if len(rich) < num_images:
        raise DataError(
            f"POPE needs {num_images} validation scenes with at least {questions_per_image // 2} kinds of objects, but"
            f" only {len(rich)} of {len(records)} have them. Raise num_validation (to about"
            f" {_suggested(len(records), len(rich), num_images)}), or lower benchmark_images or pope_questions."
        )
    first = records[:num_images]
    files = {
        pope_name(split): _json_lines(pope_questions(rich, company, split, questions_per_image, seed))
        for split in POPE_SPLITS
    }
    files[HAL_EVAL_NAME] = (json.dumps([hal_eval_item(record) for record in first]) + "\n").encode()
    files[CHAIR_NAME] = _json_lines(chair_item(record) for record in first)
    return files


def pope_questions(
    records: Iterable[Mapping[str, Any]], company: Company, split: PopeSplit, questions_per_image: int, seed: int
) -> list[dict[str, Any]]:
    """Return POPE rows, yes and no in turn.

    Absent objects are drawn evenly ("random"), are those most frequent in training ("popular") or those that most
    often accompany the present ones there ("adversarial"), as in arXiv:2305.10355, section 4.
    """
    questions: list[dict[str, Any]] = []
    for record in records:
        present = [item["category"] for item in record["objects"]]
        rng = Random(f"{seed}/pope/{record['id']}")  # the same present objects in all three splits
        asked = rng.sample(present, questions_per_image // 2)
        absent = _absent(present, company, split, rng)[: len(asked)]
        for pair in zip(asked, absent, strict=True):
            for category, label in zip(pair, ("yes", "no"), strict=True):
                questions.append(
                    {
                        "question_id": len(questions) + 1,
                        "image": record["image"],
                        "text": existence_question(category),
                        "label": label,
                    }
                )
    return questions


def hal_eval_item(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return Hal-Eval's in-domain entry of a scene."""
    by_type = {item["type"]: item["text"] for item in record["hallucinated_captions"]}
    return {
        "image": record["image"],
        "caption": record["caption"],
        "hal_caption": [
            {"type": name, "caption": by_type[kind], "from": record["source"]} for kind, name in HAL_EVAL_TYPES.items()
        ],
    }


def chair_item(record: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ground truth that CHAIR needs: an image's COCO categories and true captions."""
    return {
        "image": record["image"],
        "objects": [item["category"] for item in record["objects"]],
        "captions": [record["caption"]],
    }


def _absent(present: list[str], company: Company, split: PopeSplit, rng: Random) -> list[str]:
    absent = [name for name in CATEGORIES if name not in present]
    if split == "random":
        return rng.sample(absent, len(absent))
    if split == "popular":
        return sorted(absent, key=lambda name: (-company.frequency[name], name))
    return sorted(absent, key=lambda name: (-sum(company.together[other].get(name, 0.0) for other in present), name))


def _json_lines(rows: Iterable[Mapping[str, Any]]) -> bytes:
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def _suggested(num_scenes: int, found: int, needed: int) -> int:
    return 3 * needed if not found else -(-num_scenes * needed // found) + num_scenes // 4
