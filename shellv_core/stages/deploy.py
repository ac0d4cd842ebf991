"""Serves the champion and asks it one question."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from pydantic import Field

from shellv_core.errors import ConfigError
from shellv_core.stages.runner import StageConfig, StageResult, StageRun, run_stage

if TYPE_CHECKING:
    from collections.abc import Iterator

REQUEST_NAME = "request.json"
POLL_SECONDS, LOG_INTERVAL_SECONDS = 1.0, 10.0


class DeployConfig(StageConfig):
    """Settings of deploy.

    Attributes:
        target: local (a child process), or service (a server elsewhere that follows the alias, at `url`).
    """

    data_uri: str = ""  # output of prepare_data, whose first validation picture is asked about
    image_uri: str | None = None  # a picture to ask about instead; data_uri is then not needed
    promotion_uri: str | None = None  # output of promote that this deployment follows
    registered_model: str = Field(default="shellv", pattern=r"^[A-Za-z0-9._-]+$")
    alias: str = Field(default="champion", pattern=r"^[A-Za-z0-9._-]+$")
    target: str = "local"
    url: str | None = None  # of target=service: a running server that follows the alias
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)  # 0 takes a free one
    question: str = Field(default="What is in this picture?", min_length=1)
    max_answer_tokens: int = Field(default=64, ge=1)
    startup_timeout_seconds: float = Field(default=300.0, gt=0)
    keep_running: bool = False


@dataclass(frozen=True)
class Champion:
    """The version to roll out.

    Attributes:
        alias: the reference that names it now, ``models:/NAME@ALIAS``.
        pinned: the reference that always names it, ``models:/NAME/VERSION``.
        version: its number.
        revision: SHA-256 over its files, which a server of it reports.
    """

    alias: str
    pinned: str
    version: str
    revision: str


@dataclass(frozen=True)
class Deployment:
    """A rolled-out model: where it answers, and facts about how it runs, for the record."""

    url: str
    details: dict[str, Any]


class Deployer(Protocol):
    """A way to roll a model out."""

    def __call__(self, config: DeployConfig, champion: Champion) -> AbstractContextManager[Deployment]:
        """Roll out `champion` and wait until it is ready.

        An error raised inside the context (a wrong answer) takes the deployment back.
        """
        ...


def run(config: DeployConfig) -> StageResult:
    """Roll out the version that the alias names, and ask it one real question about a real picture.

    The stage runs every time, because its effect lies outside its output.

    Output: ``request.json``, the question as it was sent. Metrics: seconds until ready and until the answer. Details:
    version, URL, question, answer, the command that serves this model, and a curl line that asks again.

    Raises:
        ConfigError: if the target is unknown.
        ServingError: if there is no such version, the server does not start, or its answer is empty.
    """
    if config.target not in DEPLOYERS:
        raise ConfigError(f"target={config.target!r} is not a place to deploy to; allowed: {', '.join(DEPLOYERS)}.")
    if config.target == "service" and not config.url:
        raise ConfigError("target=service needs url=http://HOST:PORT, the address of a server that follows the alias.")
    inputs = {"data": None if config.image_uri else config.data_uri, "promotion": config.promotion_uri}
    return run_stage("deploy", config, _body, inputs=inputs, code=("serving",), reuse=lambda committed: False)


def _body(run: StageRun[DeployConfig]) -> None:
    import asyncio
    import json
    import time

    from shellv_core.endpoint.client import EndpointClient, user_message
    from shellv_core.errors import ServingError
    from shellv_core.logs import get_logger
    from shellv_core.serving.reference import find_registered, registered_revision

    config, logger = run.config, get_logger(__name__)
    reference = f"models:/{config.registered_model}@{config.alias}"
    registered = find_registered(reference)
    champion = Champion(
        alias=reference,
        pinned=f"models:/{registered.name}/{registered.version}",
        version=registered.version,
        revision=registered_revision(registered),
    )
    request: dict[str, Any] = {
        "messages": [user_message(config.question, _read_picture(run))],
        "max_tokens": config.max_answer_tokens,
        "temperature": 0,
    }
    body = json.dumps(request).encode()
    run.output.put_bytes(body, REQUEST_NAME)
    started = time.monotonic()
    with DEPLOYERS[config.target](config, champion) as deployment:
        ready = time.monotonic()
        client = EndpointClient(deployment.url)
        served = asyncio.run(client.model())
        if served.get("revision") != champion.revision:
            raise ServingError(
                f"{deployment.url} serves revision {str(served.get('revision'))[:12]}, but {reference} is version"
                f" {champion.version}, revision {champion.revision[:12]}; is the server one of another model?"
            )
        answer = asyncio.run(client.answer(**request)).strip()
        if not answer:
            raise ServingError(
                f"{reference} (version {registered.version}) answers {config.question!r} with nothing; the model is"
                " not fit to serve. Look at its evaluation, or move the alias back to an earlier version."
            )
        run.metrics.update(startup_seconds=ready - started, answer_seconds=time.monotonic() - ready)
        run.details.update(
            model=reference,
            version=registered.version,
            revision=served["revision"],
            target=config.target,
            url=deployment.url,
            question=config.question,
            answer=answer,
            **deployment.details,
            **_ways_to_ask(config, deployment.url, reference, body),
        )
    logger.info("deploy: %s version %s answered %r with %r", reference, registered.version, config.question, answer)


def _read_picture(run: StageRun[DeployConfig]) -> bytes:
    from shellv_core.data.shards import read_shards
    from shellv_core.errors import DataError
    from shellv_core.storage import read_bytes

    if run.config.image_uri:
        return read_bytes(run.config.image_uri)
    picture = next((each.image for each in read_shards(run.inputs["data"], "validation") if each.image), None)
    if picture is None:
        raise DataError(f"{run.inputs['data'].uri} has no validation sample with a picture; give image_uri instead.")
    return picture


def _ways_to_ask(config: DeployConfig, url: str, reference: str, body: bytes) -> dict[str, str]:
    """The command that serves this model, and the curl line that asks the same question there."""
    import shlex

    from shellv_core.serving.serve_command import DEFAULT_PORT
    from shellv_core.storage import home

    path = home() / "deploy" / REQUEST_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(body)
    port = config.port or DEFAULT_PORT
    stays = config.keep_running or config.target != "local"
    address = url if stays else f"http://127.0.0.1:{port}"
    return {
        "serve": f"shellv serve --model {reference}" + ("" if port == DEFAULT_PORT else f" --port {port}"),
        "curl": f"curl -s {address}/v1/chat/completions -H 'content-type: application/json'"
        f" -d @{shlex.quote(str(path))}",
    }


@contextlib.contextmanager
def _deploy_locally(config: DeployConfig, champion: Champion) -> Iterator[Deployment]:
    """A child process of this one; it goes with the stage unless it is to be kept."""
    from shellv_core.serving.local_server import local_server
    from shellv_core.storage import home

    log_path = home() / "logs" / "serve.log"
    with local_server(
        champion.alias, config.host, config.port, log_path, config.startup_timeout_seconds, config.keep_running
    ) as server:
        details = {"pid": server.pid, "stop": f"kill {server.pid}"} if config.keep_running else {}
        yield Deployment(server.url, details)


@contextlib.contextmanager
def _await_service(config: DeployConfig, champion: Champion) -> Iterator[Deployment]:
    """A server elsewhere that takes up what the alias names; it is only waited for."""
    import asyncio
    import time

    from shellv_core.endpoint.client import EndpointClient, EndpointError
    from shellv_core.errors import ServingError
    from shellv_core.logs import get_logger

    client, logger = EndpointClient(config.url or ""), get_logger(__name__)
    deadline = time.monotonic() + config.startup_timeout_seconds
    state, shown = "", 0.0
    while True:
        try:
            served = str(asyncio.run(client.model()).get("revision"))
            if served == champion.revision:
                asyncio.run(client.check_readiness())
                break
            state = f"it serves revision {served[:12]}"
        except EndpointError as error:
            state = str(error)
        left = deadline - time.monotonic()
        if left <= 0:
            raise ServingError(
                f"{config.url} did not take up {champion.alias} (version {champion.version}, revision"
                f" {champion.revision[:12]}) within {config.startup_timeout_seconds:g} seconds: {state}. Look at its"
                " log, or raise startup_timeout_seconds if the model needs longer to load."
            )
        if time.monotonic() - shown > LOG_INTERVAL_SECONDS:
            shown = time.monotonic()
            logger.info(
                "deploy: waiting for %s to serve version %s, %.0f s left; %s", config.url, champion.version, left, state
            )
        time.sleep(min(POLL_SECONDS, left))
    yield Deployment(client.url, {})


DEPLOYERS: dict[str, Deployer] = {"local": _deploy_locally, "service": _await_service}
