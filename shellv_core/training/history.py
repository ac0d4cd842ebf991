"""The metrics that a run has logged, on disk beside its checkpoint, so that a run that was cut has them all."""

from __future__ import annotations

import json
from pathlib import Path

HISTORY_NAME = "metrics.jsonl"


class History:
    """Appends metrics to a file of JSON lines.

    Args:
        first: the step that the run goes on from; later ones, which it does again, are forgotten.
    """

    def __init__(self, path: Path, first: int = 0) -> None:
        self.path = path
        kept = [each for each in read_history(path) if each[0] <= first] if first else []
        unfinished = path.with_suffix(".tmp")
        unfinished.write_text("".join(_line(*each) for each in kept), encoding="utf-8")
        unfinished.replace(path)

    def add(self, step: int, metrics: dict[str, float]) -> None:
        """Append the metrics of a step."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(_line(step, metrics))


def read_history(path: Path) -> list[tuple[int, dict[str, float]]]:
    """Steps and their metrics; a last line that a kill cut off is left out."""
    found = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.exists() else ():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        found.append((int(entry.pop("step")), entry))
    return found


def _line(step: int, metrics: dict[str, float]) -> str:
    return json.dumps({"step": step, **metrics}) + "\n"
