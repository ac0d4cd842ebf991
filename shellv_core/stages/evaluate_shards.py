"""Several processes share an evaluation's questions: each leaves its answers at the output, and one ends the run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from shellv_core.stages.evaluate_asking import Asking, log_path
from shellv_core.stages.evaluate_task import CODE
from shellv_core.stages.runner import StageResult, open_stage, work_folder

if TYPE_CHECKING:
    from shellv_core.evaluation.answers import Prompt, Shard
    from shellv_core.stages.evaluate_task import Task
    from shellv_core.storage import InputDirectory, OutputDirectory

PART_NAME = "parts/{name}-{index}of{count}.jsonl"


def answer_shard(task: Task, shard: Shard) -> StageResult:
    """Answer a part of the questions and leave the answers at the output."""
    output, inputs = _opened(task)
    if output.finished() is None:
        _begin(output)
        work = work_folder("evaluate", output)
        asking = Asking(task, inputs)
        names = list(asking.ask(work, shard=shard))
        for name in names:
            part = PART_NAME.format(name=name, index=shard.index, count=shard.count)
            output.put_group(part, {}, {part: log_path(work, name, shard)}, {"model": name})
    return StageResult(
        stage="evaluate",
        output_uri=output.uri,
        fingerprint=output.fingerprint,
        reused=False,
        details={"shard": f"{shard.index}/{shard.count}"},
    )


def await_shards(task: Task, shard: Shard) -> None:
    """Wait until all parts are at the output. Whoever started the processes ends this one if another fails."""
    import time

    output, _ = _opened(task)
    while output.finished() is None:
        output.begin()
        whole = [
            all(
                PART_NAME.format(name=name, index=index, count=shard.count) in output.done_groups()
                for index in range(shard.count)
            )
            for name in {str(group.note["model"]) for group in _part_groups(output)}
        ]
        if whole and all(whole):
            return
        time.sleep(1)


def _opened(task: Task) -> tuple[OutputDirectory, dict[str, InputDirectory]]:
    inputs = {key: uri for key, uri in task.inputs.items() if uri is not None}
    return open_stage("evaluate", task.config, inputs, CODE, others=task.references)


def _begin(output: OutputDirectory) -> None:
    import time

    from shellv_core.errors import OutputNotEmptyError

    try:
        output.begin()
    except OutputNotEmptyError:
        # Two that begin at once: the folder was empty for one of them, and by now holds its marker.
        time.sleep(1)
        output.begin()


def _part_groups(output: OutputDirectory) -> list[Any]:
    return [group for name, group in output.done_groups().items() if name.startswith("parts/")]


def parts_at(output: OutputDirectory, work: Path) -> dict[str, dict[Prompt, str]]:
    """Model name -> what other processes have answered."""
    from shellv_core.evaluation.answers import read_answers

    parts: dict[str, dict[Prompt, str]] = {}
    for group in _part_groups(output):
        for entry in group.scratch:
            path = work / Path(entry.name).name
            output.fetch(entry, path)
            parts.setdefault(str(group.note["model"]), {}).update(read_answers(path))
    return parts
