"""Serves the champion and asks it one question."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from pydantic import Field

from shellv_core.config import Config
from shellv_core.errors import ConfigError
from shellv_core.stages.deployers import DEPLOYERS, Champion
from shellv_core.stages.runner import StageConfig, StageResult, StageRun, run_stage

if TYPE_CHECKING:
    from shellv_core.endpoint.client import EndpointClient

REQUEST_NAME = "request.json"


class GoldenQuestion(Config):
    """A question about the same picture whose answer is known: it must contain `expected`, in whatever case."""

    question: str = Field(min_length=1)
    expected: str = Field(min_length=1)


class DeployConfig(StageConfig):
    """Settings of deploy.

    Attributes:
        target: local (a child process), service (a server elsewhere that follows the alias, at `url`), or kubernetes
            (a canary Deployment, and the stable one if its answers are good).
        golden: further questions; at least `golden_share` of them must be answered as expected.
    """

    data_uri: str = ""  # output of prepare_data, whose first validation picture is asked about
    image_uri: str | None = None  # a picture to ask about instead; data_uri is then not needed
    promotion_uri: str | None = None  # output of promote that this deployment follows
    registered_model: str = Field(default="shellv", pattern=r"^[A-Za-z0-9._-]+$")
    alias: str = Field(default="champion", pattern=r"^[A-Za-z0-9._-]+$")
    target: str = "local"
    url: str | None = None  # of target=service
    namespace: str = ""  # of target=kubernetes; empty takes the pod's own, or the kubeconfig context's
    deployment: str = "shellv-serve"  # of target=kubernetes; the canary's name ends in -canary
    host: str = "127.0.0.1"
    port: int = Field(default=0, ge=0, le=65535)  # 0 takes a free one
    question: str = Field(default="What is in this picture?", min_length=1)
    max_answer_tokens: int = Field(default=64, ge=1)
    golden: tuple[GoldenQuestion, ...] = ()
    golden_share: float = Field(default=1.0, ge=0, le=1)
    startup_timeout_seconds: float = Field(default=300.0, gt=0)
    keep_running: bool = False


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
    picture = _read_picture(run)
    request = _request(config, config.question, picture)
    body = json.dumps(request).encode()
    run.output.put_bytes(body, REQUEST_NAME)
    started = time.monotonic()
    with DEPLOYERS[config.target](config, champion) as deployment:
        ready = time.monotonic()
        client = deployment.client
        served = asyncio.run(client.model())
        if served.get("revision") != champion.revision:
            raise ServingError(
                f"{client.url} serves revision {str(served.get('revision'))[:12]}, but {reference} is version"
                f" {champion.version}, revision {champion.revision[:12]}; is the server one of another model?"
            )
        answer = asyncio.run(client.answer(**request)).strip()
        if not answer:
            raise ServingError(
                f"{reference} (version {registered.version}) answers {config.question!r} with nothing; the model is"
                " not fit to serve. Look at its evaluation, or move the alias back to an earlier version."
            )
        answered = time.monotonic()
        if config.golden:
            run.metrics["golden_share"] = _ask_golden(config, client, picture)
    run.metrics.update(
        startup_seconds=ready - started, answer_seconds=answered - ready, total_seconds=time.monotonic() - started
    )
    run.details.update(
        {
            "model": reference,
            "version": registered.version,
            "revision": champion.revision,
            "target": config.target,
            "url": client.url,
            "question": config.question,
            "answer": answer,
            **deployment.details,
        }
    )
    run.details.update(_ways_to_ask(config, run.details["url"], reference, body))
    logger.info("deploy: %s version %s answered %r with %r", reference, registered.version, config.question, answer)


def _request(config: DeployConfig, question: str, picture: bytes) -> dict[str, Any]:
    from shellv_core.endpoint.client import user_message

    return {
        "messages": [user_message(question, picture)],
        "max_tokens": config.max_answer_tokens,
        "temperature": 0,
    }


def _ask_golden(config: DeployConfig, client: EndpointClient, picture: bytes) -> float:
    """The share of the golden questions that are answered as expected."""
    import asyncio

    from shellv_core.errors import ServingError

    wrong = []
    for golden in config.golden:
        answer = asyncio.run(client.answer(**_request(config, golden.question, picture)))
        if golden.expected.lower() not in answer.lower():
            wrong.append(f"{golden.question!r} with {answer.strip()!r}, expected {golden.expected!r}")
    share = 1 - len(wrong) / len(config.golden)
    if share < config.golden_share:
        raise ServingError(
            f"{share:.0%} of the golden questions are answered as expected, golden_share={config.golden_share:g} is"
            f" needed. The model answers {'; '.join(wrong)}."
        )
    return share


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
