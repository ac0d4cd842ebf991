"""The tasks of a run as a person knows them, out of the workflow nodes that a server lists."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from pipelines.client.tables import moment, span

DRIVER = "-driver"
ROOT = "root"
#: States in which a task is over.
OVER = ("SUCCEEDED", "SKIPPED", "FAILED", "CANCELED", "CACHED", "OMITTED")


@dataclass(frozen=True)
class Task:
    """A task of a run.

    Attributes:
        key: the server's own name of it.
        name: what the pipeline calls it, numbered where a loop has several of that name.
        state: ``PENDING``, ``RUNNING``, ``SUCCEEDED``, ``SKIPPED``, ``FAILED``, ``CANCELED`` ...
        message: why it failed; empty where the server does not tell.
    """

    key: str
    name: str
    state: str
    start: datetime | None
    end: datetime | None
    message: str = ""

    @property
    def seconds(self) -> float | None:
        """How long it took; None while it is not over."""
        start, end = moment(self.start), moment(self.end)
        return (end - start).total_seconds() if start and end else None

    @property
    def time(self) -> str:
        """How long it took or has taken until now."""
        return span(self.start, self.end)


def tasks(run: Any, titles: Mapping[str, str]) -> list[Task]:
    """The tasks that have begun, in the order of their start.

    A server lists the workflow's nodes: beside each task its driver, which decides whether and with what it runs, and
    its executor. A task whose driver failed never begins and is told by the driver's failure.

    Args:
        titles: what the pipeline calls its tasks, by the names of their nodes; without them, what has a driver is one.
    """
    nodes = (run.run_details.task_details if run.run_details else None) or []
    known = set(titles) or {each.display_name.removesuffix(DRIVER) for each in nodes if _is_driver(each)} - {ROOT}
    shown = [each for each in nodes if (_is_driver(each) and each.state == "FAILED") or each.display_name in known]
    shown.sort(key=lambda each: (_stamp(each.start_time), _stamp(each.create_time), each.task_id))
    names = [each.display_name.removesuffix(DRIVER) for each in shown]
    return [
        Task(
            key=each.task_id,
            name={**titles, ROOT: "start of the pipeline"}.get(name, name)
            + (f" #{names[: index + 1].count(name)}" if names.count(name) > 1 else ""),
            state=str(each.state),
            start=each.start_time,
            end=each.end_time,
            message=str(each.error.message or "") if each.error else "",
        )
        for index, (name, each) in enumerate(zip(names, shown, strict=True))
    ]


def titles_of(spec: Any) -> dict[str, str]:
    """What the pipeline calls its tasks, by the names of their nodes; groups, as a loop or an exit handler, are none.

    Args:
        spec: the specification as a run or a version holds it, alone or with the platform's part.
    """
    if isinstance(spec, dict):
        spec = spec.get("pipeline_spec", spec)
    if not isinstance(spec, dict) or "root" not in spec:
        return {}
    components = spec.get("components", {})
    groups = {name: each["dag"] for name, each in components.items() if "dag" in each}
    tasks_of_all = [item for graph in (spec["root"]["dag"], *groups.values()) for item in graph["tasks"].items()]
    return {
        node: task.get("taskInfo", {}).get("name") or node
        for node, task in tasks_of_all
        if task["componentRef"]["name"] not in groups
    }


def _is_driver(node: Any) -> bool:
    return bool(node.display_name.endswith(DRIVER))


def _stamp(value: datetime | None) -> float:
    there = moment(value)
    return there.timestamp() if there else float("inf")
