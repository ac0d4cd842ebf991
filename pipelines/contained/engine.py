"""The Docker API of this machine: Docker's own, or one that podman serves while a run lasts."""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from components.images import CODE_LABEL, LOCK_PATH, ImageName, image
from shellv_core.errors import ConfigError, ShellVError
from shellv_core.stages.runner import code_digest

START_TIMEOUT_SECONDS = 60.0
POLL_SECONDS = 0.1
#: A service whose owner was killed ends after this time; a task keeps it busy by its log.
IDLE_SECONDS = 3600


class EngineError(ShellVError):
    """There is no container engine, or it does not do what is asked."""


@contextlib.contextmanager
def docker_api() -> Iterator[Any]:
    """A client of the API, and DOCKER_HOST for `kfp.local`, which makes its own.

    Raises:
        EngineError: if neither DOCKER_HOST, podman nor Docker gives one.
    """
    if os.environ.get("DOCKER_HOST") or shutil.which("podman") is None:
        with contextlib.closing(_connect()) as client:
            yield client
        return
    with tempfile.TemporaryDirectory(prefix="shellv-podman-") as folder:
        path = Path(folder, "api.sock")
        log_path = Path(folder, "service.log")
        with log_path.open("wb") as log:
            service = subprocess.Popen(
                ["podman", "system", "service", f"--time={IDLE_SECONDS}", f"unix://{path}"],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                # A Ctrl-C in the terminal must leave it up for tidying.
                start_new_session=True,
            )
        try:
            _wait_for(path, service, log_path)
            os.environ["DOCKER_HOST"] = f"unix://{path}"
            with contextlib.closing(_connect()) as client:
                yield client
        finally:
            os.environ.pop("DOCKER_HOST", None)
            service.terminate()
            service.wait()


def check_images(client: Any, names: Sequence[ImageName]) -> None:
    """Hold the code in the images of the lock file against this library's.

    Raises:
        ConfigError: if there is no lock file, an image is not in the engine's store, or its code is another.
    """
    import docker

    wanted = code_digest(["."])
    for name in names:
        reference = image(name, LOCK_PATH)
        try:
            found = client.images.get(reference)
        except docker.errors.ImageNotFound:
            raise ConfigError(f"the engine has no image {reference}; run `make images`.") from None
        if found.labels.get(CODE_LABEL) != wanted:
            raise ConfigError(f"{reference} holds another state of the library's code; run `make images` again.")


def _wait_for(path: Path, service: subprocess.Popen[bytes], log_path: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT_SECONDS
    while not path.exists():
        if service.poll() is not None or time.monotonic() > deadline:
            said = log_path.read_text(encoding="utf-8", errors="replace").strip()
            raise EngineError(f"`podman system service` does not start: {said or 'it says nothing'}")
        time.sleep(POLL_SECONDS)


def _connect() -> Any:
    import docker

    client = None
    try:
        client = docker.from_env(timeout=600)
        client.ping()
    except (docker.errors.DockerException, OSError) as error:
        if client is not None:
            client.close()
        raise EngineError(
            f"no container engine answers ({str(error).splitlines()[0]}). Install podman (`make podman`), start Docker,"
            " or set DOCKER_HOST."
        ) from None
    return client
