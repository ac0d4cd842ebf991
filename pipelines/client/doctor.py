"""The checks of ``doctor``: each tries one thing that a run on the cluster needs, and says what to do."""

from __future__ import annotations

import argparse
import json
import os
from dataclasses import asdict

from components.images import LOCK_PATH, read_lock
from pipelines.client.checks import Check, Failed, NotChecked, checked
from pipelines.client.choosing import LOCAL_REGISTRY
from pipelines.client.cluster_checks import cluster_checks
from pipelines.client.connection import Server
from pipelines.client.errors import PipelineServerError
from pipelines.client.runs import latest_runs
from pipelines.client.settings import settings
from pipelines.client.tables import table
from shellv_core.errors import ConfigError


def examine(options: argparse.Namespace) -> list[Check]:
    """Make all checks; one that fails does not keep the others from being made."""
    server: list[Server] = []

    def connect() -> str:
        try:
            server.append(Server(settings(options)))
        except ConfigError as error:
            what, _, remedy = str(error).partition("? ")
            raise NotChecked(what if remedy else str(error), remedy) from None
        found = server[0].settings
        return f"{found.endpoint} answers" + (f", namespace {found.namespace}" if server[0].namespace else "")

    checks = [checked("server", connect)]
    if server:
        checks.append(checked("versions", lambda: _versions(server[0])))
        checks.append(checked("credentials", lambda: _credentials(server[0])))
    checks.append(checked("bucket", lambda: _bucket(options.root_uri)))
    checks.append(checked("MLflow", _mlflow))
    checks.append(checked("images", _images))
    return [*checks, *cluster_checks(options.kubernetes_namespace)]


def as_table(checks: list[Check]) -> str:
    """A line for each check, and below them what to do."""
    lines = table(("check", "status", "what was seen"), [(each.name, each.status, each.detail) for each in checks])
    remedies = [f"  {each.name}: {each.remedy}" for each in checks if each.remedy]
    return "\n".join([lines, *(["", "what to do:"] if remedies else []), *remedies])


def as_json(checks: list[Check]) -> str:
    """A list of objects with ``name``, ``status``, ``detail`` and ``remedy``."""
    return json.dumps([asdict(each) for each in checks], indent=2)


def _versions(server: Server) -> str:
    import kfp

    ours = kfp.__version__
    try:
        theirs = server.version()
    except PipelineServerError as error:
        raise NotChecked(f"client {ours}; the server does not tell its version ({error.status})") from None
    if not theirs:
        raise NotChecked(f"client {ours}; the server does not tell its version")
    seen = f"client {ours}, server {theirs}"
    if _release(theirs)[0] != _release(ours)[0]:
        raise Failed(seen, f"use a server of release {_release(ours)[0]}.x: the API is another one.")
    if _release(theirs) < _release(ours):
        raise Failed(seen, f"bring the server to {ours}: an older one may refuse what this client compiles.")
    return seen


def _release(version: str) -> tuple[int, int]:
    major, _, rest = version.partition(".")
    minor = rest.partition(".")[0]
    return int(major), int("".join(character for character in minor if character.isdigit()) or 0)


def _credentials(server: Server) -> str:
    latest_runs(server, 1)
    return f"{server.settings.method}: runs can be listed"


def _bucket(root_uri: str | None) -> str:
    from shellv_core.storage.probe import probe

    if not root_uri:
        raise NotChecked("no --root-uri given", "give --root-uri s3://BUCKET/PREFIX, as the runs have it.")
    if not root_uri.startswith("s3://"):
        raise Failed(f"{root_uri} is a place on one machine", "give s3://BUCKET/PREFIX: tasks run on several machines.")
    probe(root_uri)
    return f"{root_uri}: put, get, upload in parts and delete work"


def _mlflow() -> str:
    from shellv_core.tracking.runs import open_client

    uri = os.environ.get("MLFLOW_TRACKING_URI")
    if not uri:
        raise NotChecked("MLFLOW_TRACKING_URI is not set", "set it to the address that the ConfigMap has.")
    open_client()
    return f"{uri} answers"


def _images() -> str:
    if not LOCK_PATH.is_file():
        raise NotChecked(f"no {LOCK_PATH.parent.name}/{LOCK_PATH.name}", "build the images: `make images`.")
    images = read_lock(LOCK_PATH).images
    local = [name for name, each in images.items() if each.reference.startswith(LOCAL_REGISTRY)]
    if local:
        raise Failed(
            f"{', '.join(local)} are on this machine only",
            "push them to a registry that the nodes reach, named by SHELLV_REGISTRY, and build again: `make images`.",
        )
    return ", ".join(f"{each.reference} {each.digest[:19]}" for each in images.values())
