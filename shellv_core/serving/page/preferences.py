"""Votes as preference data: rows of this project's LLaVA format, each an answer and one that was liked less.

`prepare_data` reads them as a ``llava`` source. The preferred answer is the row's caption and last answer, the other
its hallucinated caption: the pair that finetune's preference objective, and HACL's contrast, take.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from shellv_core.errors import ServingError
from shellv_core.serving.page.votes import Vote, VoteLog
from shellv_core.templates import IMAGE_TOKEN

EXTENSIONS = {b"\x89PNG": "png", b"\xff\xd8\xff": "jpg"}
"""First bytes of the pictures that training reads."""


def export(log: VoteLog, folder: Path) -> Counter[str]:
    """Write ``preferences.json`` and ``images/`` into `folder`; returns how many votes were written, and left out why.

    Raises:
        ServingError: if `folder` holds something, cannot be written, or a line of the log is no vote.
    """
    counts: Counter[str] = Counter()
    rows: dict[str, dict[str, Any]] = {}
    images: dict[str, bytes] = {}
    for vote in log.read():
        reason, row = _row(vote, log, images)
        counts[reason] += 1
        if row is not None:
            row["id"] = f"vote-{len(rows)}"
            rows[row["id"]] = row
    try:
        if folder.exists() and any(folder.iterdir()):
            raise ServingError(f"{folder} is not empty; give a folder that is, or a new one.")
        (folder / "images").mkdir(parents=True, exist_ok=True)
        for name, data in images.items():
            (folder / "images" / name).write_bytes(data)
        # Last and at once: a folder with rows is whole.
        half = folder / "preferences.json.part"
        half.write_text(json.dumps(list(rows.values()), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
        half.replace(folder / "preferences.json")
    except OSError as error:
        raise ServingError(f"cannot write {folder}: {error.strerror}.") from None
    return counts


def _row(vote: Vote, log: VoteLog, images: dict[str, bytes]) -> tuple[str, dict[str, Any] | None]:
    """What became of a vote, and its row without an id."""
    if vote.verdict not in ("left", "right"):
        return "no preference", None
    better, worse = (vote.left, vote.right) if vote.verdict == "left" else (vote.right, vote.left)
    if vote.image is None:
        return "no picture", None
    chosen, rejected = _text(better.answers[-1]), _text(worse.answers[-1])
    if not chosen or not rejected or chosen == rejected:
        return "equal or empty answers", None
    try:
        data = log.image(vote.image).read_bytes()
    except OSError:
        return "picture missing", None
    extension = next((each for start, each in EXTENSIONS.items() if data.startswith(start)), None)
    if extension is None:
        return "picture neither png nor jpeg", None
    name = f"{vote.image}.{extension}"
    images[name] = data
    turns = []
    for number, (question, answer) in enumerate(zip(vote.questions, better.answers, strict=True)):
        turns.append({"from": "human", "value": _text(question) if number else f"{IMAGE_TOKEN}\n{_text(question)}"})
        turns.append({"from": "gpt", "value": _text(answer)})
    return "written", {
        "id": "",
        "image": name,
        "conversations": turns,
        "caption": chosen,
        "hallucinated_captions": [{"type": "unspecified", "text": rejected}],
        "models": {"chosen": better.model, "rejected": worse.model},
    }


def _text(words: str) -> str:
    """What was said; in a row the image token would stand for a second picture."""
    return words.replace(IMAGE_TOKEN, "").strip()
