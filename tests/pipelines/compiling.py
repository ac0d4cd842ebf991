"""Pipelines compiled once for all tests, and what to find in them."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import yaml

from components.metadata import Metadata, metadata
from pipelines.compile import compiled_yaml


@functools.cache
def text_of(pipeline: str, profile: str = "cpu") -> str:
    return compiled_yaml(pipeline, profile)


@functools.cache
def documents(pipeline: str, profile: str = "cpu") -> tuple[dict[str, Any], dict[str, Any]]:
    # The C loader: the other takes seconds.
    spec, platform = yaml.load_all(text_of(pipeline, profile), yaml.CSafeLoader)
    return spec, platform


class Task(NamedTuple):
    """A task of a pipeline that runs a container.

    Attributes:
        graph: the inputs of the graph that it is in, by name.
        spec: the task's own specification.
        container: its executor's.
        place: its executor's configuration for Kubernetes.
        facts: its component's.
    """

    name: str
    graph: dict[str, Any]
    spec: dict[str, Any]
    container: dict[str, Any]
    place: dict[str, Any]
    facts: Metadata


def tasks_of(spec: dict[str, Any], platform: dict[str, Any]) -> Iterator[Task]:
    places = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    for graph in [spec["root"], *(each for each in spec["components"].values() if "dag" in each)]:
        inputs = graph.get("inputDefinitions", {}).get("parameters", {})
        for name, task in graph["dag"]["tasks"].items():
            executor = spec["components"][task["componentRef"]["name"]].get("executorLabel")
            if executor:
                container = spec["deploymentSpec"]["executors"][executor]["container"]
                yield Task(name, inputs, task, container, places[executor], metadata(container["args"][-1]))
