"""Runs one task's container for `kfp.local`, and reports how it ended.

kfp 2.17's own function lets the engine remove the container as it ends and takes one that is gone for one that did
well, so that a failed task counts as done; see https://github.com/kubeflow/pipelines/issues/13332.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from typing import Any


def run_container(client: Any, image: str, command: Sequence[str], volumes: Any, **arguments: Any) -> int:
    """Run a container to its end, print what it writes, remove it, and return its exit code.

    Raises:
        docker.errors.DockerException: if the engine refuses, or the image is nowhere.
    """
    import docker

    try:
        client.images.get(image)
    except docker.errors.ImageNotFound:
        print(f"Pulling {image}")
        client.images.pull(image)
    container = client.containers.create(image=image, command=list(command), volumes=volumes, **arguments)
    try:
        container.start()
        for line in container.logs(stream=True, follow=True):
            print(line.decode(errors="replace"), end="")
        return int(container.wait()["StatusCode"])
    finally:
        container.remove(force=True)


@contextlib.contextmanager
def docker_runner_remedied() -> Iterator[None]:
    """Within it, `kfp.local.DockerRunner` runs containers by `run_container`."""
    from kfp.local import docker_task_handler

    before = docker_task_handler.run_docker_container
    docker_task_handler.run_docker_container = run_container
    try:
        yield
    finally:
        docker_task_handler.run_docker_container = before
